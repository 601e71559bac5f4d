"""Mistakes that a developer could make, and the test that fails by each: `python tests/mutations.py [NAME ...]`
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


EDIT = re.compile(r"\[-(.*?)-\]\{\+(.*?)\+\}", re.DOTALL)
TESTS = {
    name: path
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)\(", path.read_text("utf-8"), re.MULTILINE)
}


class Mutant(NamedTuple):
    """An edit `[-old-]{+new+}` inside a text that `file` of the package has once; the test `killer` fails by it."""

    name: str
    file: str
    killer: str
    edit: str


EQUATIONS = "test_random_cases_have_the_scores_and_gradients_of_the_equations"
TIES = "test_a_tie_goes_to_the_lowest_valid_index"
RANKS = "test_any_ranks_blocks_and_scratch_give_the_loss_of_the_whole_batch"
STEP_LOSSES = "test_a_step_has_the_losses_of_the_equations"
TO_THE_BIT = "test_a_run_goes_on_to_the_bit"

# fmt: off
# name, file, killer, edit
ROWS = (
    # The op: a tie to the last index, a mean over padding, padding that wins, sums in 16 bit.
    ("op-reference-tie", "cmli/reference.py", TIES, "-torch.inf).[-max(3).values-]{+amax(3)+}"),
    ("op-reference-padding", "cmli/reference.py", "test_padding_does_not_beat_negative_similarities",
     "S.masked_fill(~token[:, :, None, :], [--torch.inf-]{+0+})"),
    ("op-reference-mean", "cmli/reference.py", EQUATIONS, "/ token.[-sum(2).clamp(min=1)-]{+shape[2]+}"),
    ("op-reference-empty", "cmli/reference.py", EQUATIONS, "return [-s_i2t.masked_fill(is_empty, 0)-]{+s_i2t+},"),
    ("op-reference-16-bit", "cmli/reference.py", "test_16_bit_products_are_summed_in_fp32",
     "dtype = [-torch.promote_types(image.dtype, torch.float32)-]{+image.dtype+}"),
    ("op-torch-tie", "cmli/fallback.py", TIES, "torch.arange([-length, 0, -1-]{+1, length + 1+}, dtype"),
    ("op-torch-padding", "cmli/fallback.py", "test_padding_does_not_beat_negative_similarities",
     "S.masked_fill_(~token[:, :, None, None], [--torch.inf-]{+0+})"),
    ("op-torch-mean", "cmli/fallback.py", EQUATIONS, "t2i = best_patch.[-sum(1) / token.sum(1)[:, None]-]{+mean(1)+}"),
    ("op-torch-16-bit", "cmli/fallback.py", "test_16_bit_products_are_summed_in_fp32",
     "return [-upcast(x) if mask is None else upcast(x)-]{+x if mask is None else x+}"),
    ("op-cpu-tie", "cmli/cpu.cpp", TIES, "is_larger = value >[--]{+=+} max;"),
    ("op-cpu-tie-of-lanes", "cmli/cpu.cpp", TIES, "(other_index [-<-]{+>+} index[r])"),
    ("op-cpu-nan", "cmli/cpu.cpp", EQUATIONS, "[-if (total - total == 0) return-]{+return+};"),
    ("op-cpu-mean", "cmli/cpu.cpp", EQUATIONS, "sum(maxima.patch_max, M) / [-M-]{+text.P+};"),
    ("op-cpu-weight", "cmli/cpu.cpp", EQUATIONS, "patch, d_i2t / [-N-]{+M+}};"),
    ("op-triton-tie", "cmli/triton_forward.py", "test_triton_interpreted",
     "tl.[-min(tl.where(over_m == row[:, None], m[None, :], NO_INDEX-]"
     "{+max(tl.where(over_m == row[:, None], m[None, :], -1+}), 1)"),
    ("op-triton-mask", "cmli/triton_forward.py", "test_triton_interpreted",
     "over_m = tl.where([-m_ok-]{+m_inside+}[None, :], s, LOW)"),
    # The losses: columns of the wrong scores, a temperature that sticks, equal captions as negatives.
    ("loss-columns", "cmli/pair_function.py", RANKS, "block.contrastive_logits(scores.[-t2i-]{+i2t+}, scale)"),
    ("loss-temperature", "cmli/loss.py", "test_one_over_the_temperature_is_at_most_100_and_learned_above_it_too",
     "[-(x + (clamped - x).detach())-]{+clamped+}.exp()"),
    ("loss-duplicates", "cmli/pair_function.py", STEP_LOSSES,
     "duplicates |= [-ids[:, k, None] == batch.global_ids[:, k]-]{+False+}"),
    ("loss-sigmoid", "cmli/pair_function.py", STEP_LOSSES, "F.softplus(signed_logits.neg_()).[-sum-]{+mean+}()"),
    ("target-mean-of-all-tokens", "losses/target_cmli.py", STEP_LOSSES,
     "return ([-(distance * token_mask).sum(1) / count).mean-]{+distance * token_mask).sum() / count.sum+}()"),
    ("target-mean-over-padding", "losses/target_cmli.py", STEP_LOSSES,
     "count = [-token_mask.sum(1).clamp(min=1-]{+torch.full_like(token_mask.sum(1), token_mask.shape[1]+})"),
    ("target-cosine", "losses/target_cmli.py", STEP_LOSSES,
     "unit_patches = [-l2_normalize(upcast(patches)-]{+upcast(patches+})"),
    ("target-half", "losses/target_cmli.py", STEP_LOSSES, "terms.append([-self-]{+2 * self+}.image_weight * loss)"),
    # Ranks: a collective that is missing, a factor of their number, another rank's texts as own ones.
    ("ranks-text-gradient", "cmli/exchange.py", RANKS,
     "[-_reduce_scatter(local_rows, global_rows-]"
     "{+local_rows.copy_(global_rows[this_rank() * num_rows :][:num_rows]+})"),
    ("ranks-column-sum", "cmli/exchange.py", RANKS, "[-    dist.all_reduce(total)\n-]{++}"),
    ("ranks-factor", "cmli/exchange.py", RANKS,
     "_reduce_scatter(local_rows, [-global_rows-]{+global_rows / num_ranks()+})"),
    ("ranks-own-texts", "cmli/pair_function.py", RANKS,
     "self.first_column = [-exchange.this_rank() * len(batch.image) + rows-]{+rows+}.start"),
    ("ranks-mean-twice", "run.py", "test_another_number_of_ranks_goes_on_with_the_batches_and_states",
     "summed_means / distributed.world_size()[--]{+ ** 2+}"),
    # Faults: a signal or the end of a launcher that is missed, a rank that hangs, a bad loss, too many of them.
    ("faults-signal", "faults/preemption.py", "test_each_signal_sets_the_flag_until_the_end",
     "[-    _requests.append((name, time.monotonic()))\n-]{++}"),
    ("faults-launcher", "faults/preemption.py", "test_a_rank_learns_of_its_launchers_end",
     "if [-psutil.Process().parents()[: len(launchers)] != launchers-]{+False+}:"),
    ("faults-hung", "faults/diagnosis.py", "test_the_rank_at_fault_is_named_and_the_job_ends",
     "if [-min(records[rank].seconds_without_progress for rank in awaited) <= limit-]{+True+}:"),
    ("faults-poison", "faults/nonfinite.py", "test_ranks_agree_and_the_samples_of_the_one_at_fault_are_told",
     "return [-loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)-]{+loss+}"),
    ("faults-most-skipped", "run.py", "test_a_run_goes_over_bad_steps_and_too_many_stop_it",
     "if [-state.skipped_in_row > MAX_SKIPPED_IN_ROW-]{+False+}:"),
    # Gradient caching.
    ("caching-factor", "engine/train_engine.py", "test_losses_and_gradients_are_those_of_one_piece",
     "factor = [-self.accumulation-]{+1.0+} / self.loss_scale"),
    ("caching-fp16", "losses/gradient_cache.py",
     "test_in_fp16_the_gradients_are_those_of_fp32_and_an_overflow_skips_the_step",
     "[-(total * loss_scale)-]{+total+}.backward()"),
    ("caching-dropout", "engine/train_engine.py", "test_micro_batches_draw_the_same_dropout_again",
     "[-                torch.set_rng_state(host_state)\n-]{++}"),
    # Data: samples that come twice or never, special tokens as words, held-out pictures that are trained on.
    ("data-position", "data/sampler.py", "test_samples_captions_and_pixels_resume_on_any_ranks_and_workers",
     "for samples in (0, self.[-global_batch-]{+offsets.size+}):"),
    ("data-resume", "data/sampler.py", "test_samples_captions_and_pixels_resume_on_any_ranks_and_workers",
     'self.position = [-state["position"]-]{+0+}'),
    ("data-epoch", "data/order.py", "test_an_epoch_has_each_sample_once_and_is_read_from_any_place",
     "order = permutation(self.length, seed, [-epoch-]{+0+})"),
    ("data-rank", "data/sampler.py", "test_samples_captions_and_pixels_resume_on_any_ranks_and_workers",
     "self.offsets = [-rank * micro_batch + np-]{+np+}"),
    ("data-mixture", "data/order.py", "test_a_mixture_takes_its_shares_and_every_sample_before_one_again",
     "position = [-epoch * share-]{+0+}"),
    ("data-lanes", "data/order.py", "test_a_rank_reads_its_lanes_alone",
     "lanes = positions [-% self.num_lanes-]{+// (-(-self.length // self.num_lanes))+}"),
    ("data-turns", "data/order.py", "test_a_mixture_takes_its_shares_and_every_sample_before_one_again",
     " % [-shares + epoch * shares-]{+shares+}"),
    ("data-special-tokens", "data/tokens.py", "test_tokens_are_those_of_the_caption_without_special_ones_and_padding",
     "valid = [[-not added and token not in self.special_ids-]{+True+} for token, added in tokens]"),
    ("data-held-out", "data/build.py", "test_a_share_is_held_out_by_name_whatever_the_order",
     "indices = [-AllBut(len(source), np.asarray(held_out_indices))-]{+range(len(source))+}"),
    ("data-bad", "data/pairs.py", "test_a_broken_image_is_a_bad_sample_and_replaced_by_the_next",
     "return replace(sample, index=[-index, bad=bad[0] if bad else None-]{+index+})"),
    # Models: padding that is seen, a class token among the patches, targets without their norm, a grid on its side.
    ("models-padding", "models/student.py", "test_padding_changes_no_text",
     "attn_mask=[-None if mask is None else mask[:, None, None]-]{+None+}"),
    ("models-class-token", "models/student.py", "test_patches_lie_row_by_row_without_the_class_token",
     "        patches = x[:, [-1:-]{+:-1+}]\n        return"),
    ("models-teacher-norm", "models/student.py", "test_the_teacher_gives_normalised_features_of_frozen_weights",
     "return [-F.layer_norm(features.float(), (self.width,)-]{+features.float(+})"),
    ("models-teacher-grid", "models/student.py", "test_the_teachers_patches_are_resampled_to_the_students_grid",
     "patches = square.[-flatten-]{+transpose(2, 3).flatten+}(2)"),
    ("models-projection", "models/student.py", "test_one_projection_starts_orthonormal_and_serves_both_sides",
     "[-            nn.init.orthogonal_(self.projection.weight)\n-]{++}"),
    # A run's folder and its export: constants and tied tables lost, the wrong end.
    ("hf-constants", "models/hf.py", "test_what_was_trained_is_loaded_to_the_bit",
     "[-model.get_buffer(name).copy_(value)-]{+pass+}"),
    ("hf-tied", "models/hf.py", "test_what_was_trained_is_loaded_to_the_bit",
     '[-self.all_tied_weights_keys[f"{name}.{copy}"] = f"{name}.{table}"-]{+pass+}'),
    ("export-interpolate", "export.py", "test_interpolated_it_is_between_the_source_and_the_trained_weights",
     ".lerp(trained[name], [-share-]{+1 - share+})"),
    # The engine: a frozen layer that learns, tables that decay, rates upside down, a first update at rate 0.
    ("engine-frozen", "engine/parameter_groups.py", "test_frozen_layers_keep_every_bit_and_the_others_move",
     "(depth <[-=-]{++} num_frozen or"),
    ("engine-decay", "engine/parameter_groups.py", "test_matrices_alone_decay",
     "[- and parameter not in without_decay-]{++}"),
    ("engine-layer-decay", "engine/parameter_groups.py", "test_a_layer_below_has_a_lower_rate",
     "layers_above = [-layers + 1 - depth-]{+depth+}"),
    ("engine-warm-up", "engine/build.py", "test_each_step_trains_at_the_rate_that_is_logged_for_it",
     "rate([-done + 1-]{+done+}, total_steps)"),
    # Checkpoints: what is not restored, or another rank's; damage that is not seen.
    ("checkpoint-generators", "checkpoint/state.py", TO_THE_BIT,
     '[-torch.set_rng_state(self.generators["torch"])-]{+pass+}'),
    ("checkpoint-sampler", "checkpoint/start.py", TO_THE_BIT, "[-sampler.load_state_dict(state.sampler)-]{+pass+}"),
    ("checkpoint-averages", "checkpoint/load.py", TO_THE_BIT,
     "[-        load_averages(checkpoint / AVERAGE, train_engine)\n-]{++}"),
    ("checkpoint-rank", "checkpoint/state.py", TO_THE_BIT, "load_tensors(files[[-rank-]{+0+}])"),
    ("checkpoint-damage", "checkpoint/storage.py", "test_each_damaged_file_is_named_and_the_one_before_taken",
     "if [-sha256(checkpoint / name) != digest-]{+not sha256(checkpoint / name)+}:"),
    ("checkpoint-step", "checkpoint/universal.py", "test_another_number_of_ranks_goes_on_with_the_batches_and_states",
     "updates = [-float-]{+0 * float+}("),
    # Memory: the allocator's rules, and what several ranks share.
    ("memory-rest", "memory_model/caching_allocator.py", "test_worked_out_by_hand",
     "is_split = left >= MIN_BLOCK if small else left >[--]{+=+} SMALL_REQUEST"),
    ("memory-segment", "memory_model/caching_allocator.py", "test_worked_out_by_hand",
     "elif size >[-=-]{++} MIN_LARGE_SEGMENT_REQUEST:"),
    ("memory-neighbours", "memory_model/caching_allocator.py", "test_worked_out_by_hand",
     "nearby = slice(max(place - 1, 0), place + [-2-]{+1+})"),
    ("memory-ranks", "memory/command.py", "test_what_stays_through_a_step_is_counted_once_and_shared_by_ranks",
     "step = Step(config, ds_config, [-options.world_size-]{+1+})"),
    # Evaluation.
    ("evaluate-ties", "evaluate/measures.py", "test_a_tie_is_a_random_order",
     "above = (~(scores <[-=-]{++} best) & ~is_right)"),
    ("evaluate-ways", "evaluate/measures.py", "test_recall_as_by_sorting",
     "return best_captions, [-t2i-]{+i2t+}.gather(1, own"),
    ("evaluate-classes", "evaluate/measures.py", "test_accuracies_by_class_weigh_classes_alike",
     'return {**means, "mean_per_class": [-top1_of_class.mean(-]'
     "{+(hits_of_class.sum() / images_of_class.sum()+}).item()}"),
    ("evaluate-centres", "evaluate/measures.py", "test_hits_of_phrases",
     "y = top + [-(torch.arange(rows).double() + 0.5-]{+torch.arange(rows).double(+})"),
    ("evaluate-ranks", "evaluate/zero_shot.py", "test_zero_shot_of_two_ranks_is_that_of_one",
     "gathered = [-distributed.gather_objects(own_results)-]{+[own_results]+}"),
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
    """Return the file with the mistake. Raises `ValueError` unless it has the old text once."""
    text = (ROOT / "ds_cmli" / mutant.file).read_text()
    old = EDIT.sub(lambda match: match[1], mutant.edit)
    new = EDIT.sub(lambda match: match[2], mutant.edit)
    if text.count(old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} has {text.count(old)} times {old!r}")
    return text.replace(old, new)


def import_libraries() -> None:
    """Import what all tests import, for the forks of this process."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    for library in LIBRARIES:
        importlib.import_module(library)


def run_tests(file: str, source: str, tests: list[str], seconds: float) -> tuple[int, str]:
    """Return the exit code of tests in a copy of the repository whose `file` is `source`, and what they print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "copy")
        copy_of_repository(folder)
        (folder / file).write_text(source)
        # Forked, with the libraries imported.
        child = multiprocessing.get_context("fork").Process(target=run_pytest, args=(folder, tests))
        child.start()
        child.join(seconds)
        with suppress(ProcessLookupError):  # it, or what it has left behind
            os.killpg(child.pid, signal.SIGKILL)
        child.join()
        return child.exitcode, (folder / "printed").read_text()


def run_pytest(folder: Path, tests: list[str]) -> None:
    """Make `folder` the repository that this process and its children import, and run tests there."""
    os.setsid()
    os.chdir(folder)
    for number in (1, 2):
        os.dup2(os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ["PYTHONPATH"] = sys.path[0] = str(folder)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "ds_cmli")]:
        del sys.modules[name]
    os._exit(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *tests]))


def outcome(mutant: Mutant) -> str:
    """Return "killed", "SURVIVED", or what has gone wrong."""
    file = TESTS[mutant.killer].relative_to(ROOT)
    exit_code, printed = run_tests(f"ds_cmli/{mutant.file}", mutated(mutant), [f"{file}::{mutant.killer}"], SECONDS)
    if exit_code == 1 and not re.search(r"^ERROR tests/\S+\.py( |$)", printed, re.MULTILINE):
        return "killed"
    return {0: "SURVIVED", -signal.SIGKILL: "HANGS"}.get(exit_code, f"BROKEN: {printed[-1500:]}")


def main(names: list[str]) -> int:
    wrong_names = set(names) - {mutant.name for mutant in MUTANTS}
    if wrong_names:
        raise SystemExit(f"no mutant is named {', '.join(sorted(wrong_names))}")
    chosen = [mutant for mutant in MUTANTS if mutant.name in names or not names]
    for mutant in chosen:
        mutated(mutant)
    import_libraries()
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

        options = arguments.random, arguments.seed, arguments.room, arguments.coverage, arguments.jobs
        sys.exit(random_mutants.main(*options))
    sys.exit(main(arguments.names))
