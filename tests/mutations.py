"""Sixty mistakes that a developer could make, and the test that fails by each: `python tests/mutations.py [NAME ...]`
Mistakes by chance: `python tests/mutations.py --random 150 --seed 1` (random_mutants.py).

Each is made in a copy of the repository, in which its killer runs: a quick test of public functions and commands, so
that it outlives what it guards. A mistake's place moves with the code. mutmut and cosmic-ray make mutations of every
operator and number, but remove no call, such as a collective.
"""

import argparse
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "deepspeed", "transformers", "timm", "torch.utils.tensorboard")
SECONDS = 600  # a mistake that makes ranks wait for each other ends by their own limits before that


class Mutant(NamedTuple):
    """`old`, which `file` of the package has once, becomes `new`; `killer` is a test in tests/."""

    name: str
    file: str
    killer: str
    old: str
    new: str


OP, LOSS = "cmli/test_op.py::", "cmli/test_loss.py::"
LOSSES, ENGINE = "losses/test_losses.py::", "engine/test_behaviour.py::"
DATA, MODELS = "data/test_behaviour.py::", "models/test_behaviour.py::"
ANY_RANKS = "data/test_pairs.py::test_samples_captions_and_pixels_resume_on_any_ranks_and_workers"
CHECKPOINT, MEMORY = "checkpoint/test_behaviour.py::", "memory/test_prediction.py::"
ALLOCATOR = "memory_model/test_allocator.py::test_worked_out_by_hand"
FAULTS, CACHING = "faults/test_", "engine/test_gradient_caching.py::"
EVALUATE = "evaluate/test_behaviour.py::"
EQUATIONS = OP + "test_random_cases_have_the_scores_and_gradients_of_the_equations"
TIES = OP + "test_a_tie_goes_to_the_lowest_valid_index"
RANKS = LOSS + "test_any_ranks_blocks_and_scratch_give_the_loss_of_the_whole_batch"
OF_A_STEP = LOSSES + "test_a_step_has_the_losses_of_the_equations"

# fmt: off
# name, file, killer, old, new
ROWS = (
    # The op: a tie to the last index, a mean over padding, padding that wins, sums in 16 bit.
    ("op-reference-tie", "cmli/reference.py", TIES, "-torch.inf).max(3).values", "-torch.inf).amax(3)"),
    ("op-reference-padding", "cmli/reference.py", OP + "test_padding_does_not_beat_negative_similarities",
     "S.masked_fill(~token[:, :, None, :], -torch.inf)", "S.masked_fill(~token[:, :, None, :], 0)"),
    ("op-reference-mean", "cmli/reference.py", EQUATIONS, "/ token.sum(2).clamp(min=1)", "/ token.shape[2]"),
    ("op-reference-empty", "cmli/reference.py", EQUATIONS, "return s_i2t.masked_fill(is_empty, 0),", "return s_i2t,"),
    ("op-reference-16-bit", "cmli/reference.py", OP + "test_16_bit_products_are_summed_in_fp32",
     "dtype = torch.promote_types(image.dtype, torch.float32)", "dtype = image.dtype"),
    ("op-torch-tie", "cmli/fallback.py", TIES,
     "torch.arange(length, 0, -1, dtype", "torch.arange(1, length + 1, dtype"),
    ("op-torch-padding", "cmli/fallback.py", OP + "test_padding_does_not_beat_negative_similarities",
     "S.masked_fill_(~token[:, :, None, None], -torch.inf)", "S.masked_fill_(~token[:, :, None, None], 0)"),
    ("op-torch-mean", "cmli/fallback.py", EQUATIONS,
     "t2i = best_patch.sum(1) / token.sum(1)[:, None]", "t2i = best_patch.mean(1)"),
    ("op-torch-16-bit", "cmli/fallback.py", OP + "test_16_bit_products_are_summed_in_fp32",
     "return upcast(x) if mask is None else upcast(x)", "return x if mask is None else x"),
    ("op-cpu-tie", "cmli/cpu.cpp", TIES, "is_larger = value > max;", "is_larger = value >= max;"),
    ("op-cpu-tie-of-lanes", "cmli/cpu.cpp", TIES, "(other_index < index[r])", "(other_index > index[r])"),
    ("op-cpu-nan", "cmli/cpu.cpp", EQUATIONS, "if (total - total == 0) return;", "return;"),
    ("op-cpu-mean", "cmli/cpu.cpp", EQUATIONS, "sum(maxima.patch_max, M) / M;", "sum(maxima.patch_max, M) / text.P;"),
    ("op-cpu-weight", "cmli/cpu.cpp", EQUATIONS,
     "patch, d_i2t / N};", "patch, d_i2t / M};"),
    ("op-triton-tie", "cmli/triton_forward.py", "cmli/test_triton.py::test_triton_interpreted",
     "tl.min(tl.where(over_m == row[:, None], m[None, :], NO_INDEX), 1)",
     "tl.max(tl.where(over_m == row[:, None], m[None, :], -1), 1)"),
    ("op-triton-mask", "cmli/triton_forward.py", "cmli/test_triton.py::test_triton_interpreted",
     "over_m = tl.where(m_ok[None, :], s, LOW)", "over_m = tl.where(m_inside[None, :], s, LOW)"),
    # The losses: columns of the wrong scores, a temperature that sticks, equal captions as negatives.
    ("loss-columns", "cmli/pair_function.py", RANKS,
     "block.contrastive_logits(scores.t2i, scale)", "block.contrastive_logits(scores.i2t, scale)"),
    ("loss-temperature", "cmli/loss.py",
     LOSS + "test_one_over_the_temperature_is_at_most_100_and_learned_above_it_too",
     "(x + (clamped - x).detach()).exp()", "clamped.exp()"),
    ("loss-duplicates", "cmli/pair_function.py", OF_A_STEP,
     "duplicates |= ids[:, k, None] == batch.global_ids[:, k]", "duplicates |= False"),
    ("loss-sigmoid", "cmli/pair_function.py", OF_A_STEP, "F.softplus(signed_logits.neg_()).sum()",
     "F.softplus(signed_logits.neg_()).mean()"),
    ("target-mean-of-all-tokens", "losses/target_cmli.py", OF_A_STEP,
     "return ((distance * token_mask).sum(1) / count).mean()", "return (distance * token_mask).sum() / count.sum()"),
    ("target-mean-over-padding", "losses/target_cmli.py", OF_A_STEP, "count = token_mask.sum(1).clamp(min=1)",
     "count = torch.full_like(token_mask.sum(1), token_mask.shape[1])"),
    ("target-cosine", "losses/target_cmli.py", OF_A_STEP,
     "unit_patches = l2_normalize(upcast(patches))", "unit_patches = upcast(patches)"),
    ("target-half", "losses/target_cmli.py", OF_A_STEP, "terms.append(self.image_weight * loss)",
     "terms.append(2 * self.image_weight * loss)"),
    # Ranks: a collective that is missing, a factor of their number, another rank's texts as own ones.
    ("ranks-text-gradient", "cmli/exchange.py", RANKS, "_reduce_scatter(local_rows, global_rows)",
     "local_rows.copy_(global_rows[this_rank() * num_rows :][:num_rows])"),
    ("ranks-column-sum", "cmli/exchange.py", RANKS, "    dist.all_reduce(total)\n", ""),
    ("ranks-factor", "cmli/exchange.py", RANKS,
     "_reduce_scatter(local_rows, global_rows)", "_reduce_scatter(local_rows, global_rows / num_ranks())"),
    ("ranks-own-texts", "cmli/pair_function.py", RANKS,
     "self.first_column = exchange.this_rank() * len(batch.image) + rows.start", "self.first_column = rows.start"),
    ("ranks-mean-twice", "distributed/process_group.py",
     CHECKPOINT + "test_another_number_of_ranks_goes_on_with_the_batches_and_states", "div_(world_size())",
     "div_(world_size() ** 2)"),
    # Faults: a signal or the end of a launcher that is missed, a rank that hangs, a bad loss, too many of them.
    ("faults-signal", "faults/preemption.py", FAULTS + "preemption.py::test_each_signal_sets_the_flag_until_the_end",
     "    _requested.append((name, now))\n", ""),
    ("faults-launcher", "faults/preemption.py", FAULTS + "preemption.py::test_a_rank_learns_of_its_launchers_end",
     "if psutil.Process().parents()[: len(launchers)] != launchers:", "if False:"),
    ("faults-hung", "faults/diagnosis.py",
     FAULTS + "watchdog.py::test_the_rank_at_fault_is_named_and_the_job_ends",
     "if min(records[rank].still for rank in busy) <= limit:", "if True:"),
    ("faults-poison", "faults/nonfinite.py",
     FAULTS + "nonfinite.py::test_ranks_agree_and_the_samples_of_the_one_at_fault_are_told",
     "return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)", "return loss"),
    ("faults-most-skipped", "run.py",
     FAULTS + "nonfinite.py::test_a_run_goes_over_bad_steps_and_too_many_stop_it_with_a_checkpoint_from_before",
     "if state.skipped_in_row > MAX_SKIPPED_IN_ROW:", "if False:"),
    # Gradient caching.
    ("caching-factor", "engine/train_engine.py",
     CACHING + "test_losses_and_gradients_are_those_of_one_piece",
     "factor = self.accumulation / self.loss_scale", "factor = 1.0 / self.loss_scale"),
    ("caching-fp16", "losses/gradient_cache.py",
     CACHING + "test_in_fp16_the_gradients_are_those_of_fp32_and_an_overflow_skips_the_step",
     "(total * loss_scale).backward()", "total.backward()"),
    ("caching-dropout", "engine/train_engine.py", CACHING + "test_micro_batches_draw_the_same_dropout_again",
     "                torch.set_rng_state(host_state)\n", ""),
    # Data: samples that come twice or never, special tokens as words, held-out pictures that are trained on.
    ("data-position", "data/sampler.py", ANY_RANKS,
     "for samples in (0, self.global_batch):", "for samples in (0, self.offsets.size):"),
    ("data-resume", "data/sampler.py", ANY_RANKS, 'self.position = state["position"]', "self.position = 0"),
    ("data-epoch", "data/order.py", DATA + "test_an_epoch_has_each_sample_once_and_each_epoch_its_own_order",
     "order = permutation(self.length, seed, epoch)", "order = permutation(self.length, seed, 0)"),
    ("data-rank", "data/sampler.py", ANY_RANKS, "self.offsets = rank * micro_batch + np", "self.offsets = np"),
    ("data-mixture", "data/order.py", DATA + "test_a_mixture_takes_its_shares_and_every_sample_before_one_again",
     "position = epoch * share", "position = 0"),
    ("data-lanes", "data/order.py", "data/test_order.py::test_a_rank_reads_its_lanes_alone",
     "lanes = positions % self.num_lanes", "lanes = positions // (-(-self.length // self.num_lanes))"),
    ("data-turns", "data/order.py",
     "data/test_order.py::test_a_windowed_mixture_takes_its_shares_and_every_sample_before_one_again",
     " % shares + epoch * shares", " % shares"),
    ("data-special-tokens", "data/tokens.py",
     DATA + "test_tokens_are_those_of_the_caption_without_special_ones_and_padding",
     "valid = [not added and token not in self.special_ids for token, added in tokens]",
     "valid = [True for token, added in tokens]"),
    ("data-held-out", "data/build.py", "data/test_build.py::test_a_share_is_held_out_by_name_whatever_the_order",
     "source, AllBut(len(source), np.asarray(indices))", "source, range(len(source))"),
    ("data-bad", "data/pairs.py", DATA + "test_a_broken_sample_is_replaced_by_the_next_and_counted",
     "return replace(sample, index=index, bad=bad[0] if bad else None)", "return replace(sample, index=index)"),
    # Models: padding that is seen, a class token among the patches, targets without their norm, a grid on its side.
    ("models-padding", "models/student.py", MODELS + "test_padding_changes_no_text",
     "attn_mask=None if mask is None else mask[:, None, None]", "attn_mask=None"),
    ("models-class-token", "models/student.py", MODELS + "test_patches_lie_row_by_row_without_the_class_token",
     "        patches = x[:, 1:]\n        return", "        patches = x[:, :-1]\n        return"),
    ("models-teacher-norm", "models/student.py",
     MODELS + "test_the_teacher_gives_normalised_features_of_frozen_weights",
     "return F.layer_norm(features.float(), (self.width,))", "return features.float()"),
    ("models-teacher-grid", "models/student.py",
     MODELS + "test_the_teachers_patches_are_resampled_to_the_students_grid", "patches = square.flatten(2)",
     "patches = square.transpose(2, 3).flatten(2)"),
    ("models-projection", "models/student.py", MODELS + "test_one_projection_starts_orthonormal_and_serves_both_sides",
     "            nn.init.orthogonal_(self.projection.weight)\n", ""),
    # What a run's folder loads as, and what is written of it: constants and tied tables lost, the wrong end.
    ("hf-constants", "models/hf.py", "models/test_hf.py::test_what_was_trained_is_loaded_to_the_bit",
     "model.get_buffer(name).copy_(value)", "pass"),
    ("hf-tied", "models/hf.py", "models/test_hf.py::test_what_was_trained_is_loaded_to_the_bit",
     'self.all_tied_weights_keys[f"{name}.{copy}"] = f"{name}.{table}"', "pass"),
    ("export-interpolate", "export.py",
     "test_export.py::test_interpolated_it_is_between_the_source_and_the_trained_weights",
     ".lerp(trained[name], share)", ".lerp(trained[name], 1 - share)"),
    # The engine: a frozen layer that learns, tables that decay, rates upside down, a first update at rate 0.
    ("engine-frozen", "engine/parameter_groups.py", ENGINE + "test_frozen_layers_keep_every_bit_and_the_others_move",
     "(depth <= num_frozen or", "(depth < num_frozen or"),
    ("engine-decay", "engine/parameter_groups.py",
     ENGINE + "test_matrices_decay_and_vectors_tables_and_temperatures_do_not",
     " and parameter not in without_decay", ""),
    ("engine-layer-decay", "engine/parameter_groups.py", ENGINE + "test_a_layer_below_has_a_lower_rate",
     "layers_above = layers + 1 - depth", "layers_above = depth"),
    ("engine-warm-up", "engine/build.py", ENGINE + "test_each_rate_of_the_warm_up_is_that_of_its_update",
     "rate(done + 1, total_steps)", "rate(done, total_steps)"),
    # Checkpoints: what is not restored, or another rank's; damage that is not seen.
    ("checkpoint-generators", "checkpoint/state.py", CHECKPOINT + "test_a_run_goes_on_to_the_bit",
     'torch.set_rng_state(self.generators["torch"])', "pass"),
    ("checkpoint-sampler", "checkpoint/start.py", CHECKPOINT + "test_a_run_goes_on_to_the_bit",
     "sampler.load_state_dict(state.sampler)", "pass"),
    ("checkpoint-averages", "checkpoint/load.py", CHECKPOINT + "test_a_run_goes_on_to_the_bit",
     "        load_averages(checkpoint / AVERAGE, train_engine)\n", ""),
    ("checkpoint-rank", "checkpoint/state.py", CHECKPOINT + "test_a_run_goes_on_to_the_bit",
     "_read_part(files[rank])", "_read_part(files[0])"),
    ("checkpoint-damage", "checkpoint/storage.py",
     "checkpoint/test_start.py::test_each_damaged_file_is_named_and_the_one_before_taken",
     "if sha256(checkpoint / name) != digest:", "if not sha256(checkpoint / name):"),
    ("checkpoint-step", "checkpoint/universal.py",
     CHECKPOINT + "test_another_number_of_ranks_goes_on_with_the_batches_and_states", "updates = float(",
     "updates = 0 * float("),
    # Memory: the allocator's rules, and what several ranks share.
    ("memory-rest", "memory_model/caching_allocator.py", ALLOCATOR,
     "if left >= MIN_BLOCK if small else left > SMALL_REQUEST:",
     "if left >= MIN_BLOCK if small else left >= SMALL_REQUEST:"),
    ("memory-segment", "memory_model/caching_allocator.py", ALLOCATOR,
     "elif size >= MIN_LARGE_SEGMENT_REQUEST:", "elif size > MIN_LARGE_SEGMENT_REQUEST:"),
    ("memory-neighbours", "memory_model/caching_allocator.py", ALLOCATOR,
     "if after is not None and not after.requested:",
     "if after is not None and not after.requested and before is None:"),
    ("memory-ranks", "memory/command.py", MEMORY + "test_what_stays_through_a_step_is_counted_once_and_shared_by_ranks",
     "step = Step(config, ds_config, chosen.world_size)", "step = Step(config, ds_config, 1)"),
    # Evaluation.
    ("evaluate-ties", "evaluate/measures.py", EVALUATE + "test_a_tie_is_a_random_order",
     "above = (~(scores <= best) & ~is_right)", "above = (~(scores < best) & ~is_right)"),
    ("evaluate-ways", "evaluate/measures.py", EVALUATE + "test_recall_as_by_sorting",
     "return best_captions, t2i.gather(1, own", "return best_captions, i2t.gather(1, own"),
    ("evaluate-classes", "evaluate/measures.py", EVALUATE + "test_accuracies_by_class_weigh_classes_alike",
     "return {**means, \"mean_per_class\": of_present.mean().item()}",
     "return {**means, \"mean_per_class\": (hits_of_class.sum() / images_of_class.sum()).item()}"),
    ("evaluate-centres", "evaluate/measures.py", EVALUATE + "test_hits_of_phrases",
     "y = top + (torch.arange(rows).double() + 0.5)", "y = top + torch.arange(rows).double()"),
    ("evaluate-ranks", "evaluate/zero_shot.py", "evaluate/test_command.py::test_zero_shot_of_two_ranks_is_that_of_one",
     "gathered = distributed.gather_objects(own_results)", "gathered = [own_results]"),
)
# fmt: on
MUTANTS = [Mutant(*row) for row in ROWS]


def copy_of_repository(folder: Path) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        if os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


def mutated(mutant: Mutant) -> str:
    """The file with the mistake. Raises `ValueError` unless it has the old text once."""
    text = (ROOT / "ds_cmli" / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} has {text.count(mutant.old)} times {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


def outcome(mutant: Mutant) -> str:
    """ "killed", "SURVIVED", or what has gone wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "copy")
        copy_of_repository(folder)
        (folder / "ds_cmli" / mutant.file).write_text(mutated(mutant))
        # Forked, with the libraries imported.
        child = multiprocessing.get_context("fork").Process(target=run_killer, args=(folder, mutant.killer))
        child.start()
        child.join(SECONDS)
        with suppress(ProcessLookupError):  # it, or what it has left behind
            os.killpg(child.pid, signal.SIGKILL)
        child.join()
        printed = (folder / "printed").read_text()
    if child.exitcode == 1 and not re.search(r"^ERROR tests/\S+\.py( |$)", printed, re.MULTILINE):
        return "killed"
    return {0: "SURVIVED", -signal.SIGKILL: "HANGS"}.get(child.exitcode, f"BROKEN: {printed[-1500:]}")


def run_killer(folder: Path, killer: str) -> None:
    os.setsid()
    os.chdir(folder)
    for number in (1, 2):
        os.dup2(os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ["PYTHONPATH"] = sys.path[0] = str(folder)
    os._exit(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", f"tests/{killer}"]))


def main(names: list[str]) -> int:
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        raise SystemExit(f"no mutant is named {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if mutant.name in names or not names]
    for mutant in chosen:
        mutated(mutant)
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    for library in LIBRARIES:
        importlib.import_module(library)
    outcomes = []
    for mutant in chosen:
        start = time.monotonic()
        outcomes.append(outcome(mutant))
        print(f"| {mutant.name} | {mutant.killer} | {outcomes[-1]} | {time.monotonic() - start:.0f} s |", flush=True)
    return int(any(result != "killed" for result in outcomes))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="mutants of the table; none: all")
    parser.add_argument("--random", type=int, default=0, help="make so many mistakes by chance instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--room", default="", help="of these files alone, such as `losses/` or `run.py`")
    parser.add_argument("--coverage", type=Path, default=Path(tempfile.gettempdir(), "ds-cmli-coverage.json"))
    parser.add_argument("--jobs", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_arguments()
    if arguments.random:
        sys.path[0] = str(ROOT)
        from tests import random_mutants

        given = arguments.random, arguments.seed, arguments.room, arguments.coverage, arguments.jobs
        sys.exit(random_mutants.main(*given))
    sys.exit(main(arguments.names))
