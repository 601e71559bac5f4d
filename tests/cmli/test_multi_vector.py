"""`with_maxsim` on the losses of sentence-transformers 6 and PyLate: equal to their own, on one rank and two.

PyLate 1.6 requires sentence-transformers 5, so that pip installs one of the extras, but its losses run with both.
"""

import functools
import importlib
import importlib.util
import tempfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from ds_cmli.cmli.multi_vector import MaxSimScores, with_maxsim
from ds_cmli.cmli.ring import Scorer
from tests.conftest import spawn

WORDS = list("abcdefgh.,")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
RING = {"exchange": "ring"}


def library(name, version):
    """The module of a library's losses, or a skip with the reason."""
    module = importlib.util.find_spec(name)
    if module is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[{name.replace('_', '-')}]'")
    pytest.importorskip(name, minversion=version)
    inside = ".multi_vector_encoder.losses" if name == "sentence_transformers" else ".losses"
    return importlib.import_module(name + inside)


class Encoder(nn.Module):
    """Two columns of a batch in different ways, by position and token, with dropout: what a model of PyLate has."""

    skiplist = (WORDS.index(".") + len(SPECIAL),)

    def __init__(self, expansion):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.do_query_expansion = expansion
        self.words = nn.Parameter(torch.randn(len(SPECIAL) + len(WORDS), 8, generator=g))
        self.places = nn.Parameter(torch.randn(12, 8, generator=g) / 2)

    def forward(self, features, task=None):
        ids = features["input_ids"]
        x = self.words[ids] + self.places[: ids.shape[1]]
        return {**features, "token_embeddings": F.dropout(x, 0.1, self.training)}


def columns(rows, names=3, seed=0, longest=9):
    """Features of a query and its documents, padded to one length; row r is the same in any batch."""
    features = []
    for name in range(names):
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for place, row in enumerate(rows):
            g = torch.Generator().manual_seed(1000 * seed + 10 * row + name)
            length = int(torch.randint(2, longest, (1,), generator=g))
            drawn = torch.randint(len(SPECIAL), len(SPECIAL) + len(WORDS), (length,), generator=g)
            ids[place, :length] = drawn
        features.append({"input_ids": ids, "attention_mask": (ids > 0).long()})
    return features


def value_and_gradients(loss, features, labels=None):
    loss.zero_grad()
    torch.manual_seed(3)  # of dropout
    value = loss(features, labels) if labels is not None else loss(features)
    value.backward()
    return [value.detach(), *(x.grad for x in loss.parameters() if x.grad is not None)]


def same(ours, own, **tolerance):
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-5}
    for got, want in zip(ours, own, strict=True):
        assert_close(got.to(want.dtype), want, **tolerance)
    assert all(x.isfinite().all() for x in own) and len(own) > 1 and own[1].any()


PYLATE = {
    "Contrastive": {"temperature": 0.5},
    "Contrastive, sum, in chunks": {"size_average": False, "score_mini_batch_size": 2},
    "CachedContrastive": {"mini_batch_size": 2, "temperature": 0.3},
    "Distillation": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PYLATE)
@pytest.mark.parametrize("expansion", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pylate(name, expansion, dtype):
    losses = library("pylate", "1.5")
    build = functools.partial(getattr(losses, name.split(",")[0]), Encoder(expansion).to(dtype), **PYLATE[name])
    features, labels = columns(range(5)), None
    if name == "Distillation":
        features, labels = [features[0], columns(range(15), 2)[1]], torch.rand(5, 3)
    own = value_and_gradients(build(), features, labels)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {}
    same(value_and_gradients(with_maxsim(build()), features, labels), own, **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [2, 3, 5])
def test_pylate_cached_is_whole(documents):
    losses, model = library("pylate", "1.5"), Encoder(True).eval()
    features = columns(range(5), documents)
    whole = value_and_gradients(with_maxsim(losses.Contrastive(model, temperature=0.5)), features)
    cached = losses.CachedContrastive(model, mini_batch_size=2, temperature=0.5, size_average=False)
    parts = value_and_gradients(with_maxsim(cached), features)
    same([x / 5 for x in parts], whole)


EVEN, CHUNKS = (range(3), range(3, 6)), (range(5), range(5, 6))  # the rows of each rank
# One start of ranks for all: their imports take most of the time.
PYLATE_RUNS = [(name, EVEN, options) for name in list(PYLATE)[:2] for options in ({}, RING)]
PYLATE_RUNS += [("CachedContrastive", rows, {}) for rows in (EVEN, CHUNKS)]


def pylate_on_rank(rank, ranks):
    losses, model, results = library("pylate", "1.5"), Encoder(True).eval(), []
    for name, rows, options in PYLATE_RUNS:
        settings = {**PYLATE[name], "size_average": True, "gather_across_devices": True}
        loss = with_maxsim(getattr(losses, name.split(",")[0])(model, **settings), **options)
        results.append(value_and_gradients(loss, columns(rows[rank])))
    return results


def mean(results):
    return [torch.stack(x).mean(0) for x in zip(*results, strict=True)]


@pytest.mark.slow
def test_pylate_on_two_ranks_equals_one():
    """Ranks whose last batch is smaller make other numbers of chunks, and none waits for another."""
    losses, model = library("pylate", "1.5"), Encoder(True).eval()
    for (name, rows, _), results in zip(PYLATE_RUNS, zip(*spawn(pylate_on_rank, 2), strict=True), strict=True):
        cached, temperature = name == "CachedContrastive", PYLATE[name].get("temperature", 1.0)
        whole = losses.Contrastive(model, temperature=temperature, size_average=not cached)
        own = value_and_gradients(whole, columns(range(6)))
        ours = mean(results)
        if cached:  # PyLate averages only the value over queries, its gradients are those of the sum
            ours = [sum(x) for x in zip(*results, strict=True)]
            ours[0] = sum(len(mine) * x[0] for mine, x in zip(rows, results, strict=True))
        same(ours, own)


@functools.cache
def encoder(expansion):
    """A model of sentence-transformers with punctuation in its skiplist, from a tiny BERT made here."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({x: n for n, x in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {f"{x}_token": f"[{x.upper()}]" for x in ("pad", "unk", "cls", "sep", "mask")}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(SPECIAL + WORDS), max_position_embeddings=32, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
        eight = {"strategy": "fixed", "length": 8, "token": "[MASK]"}
        bert = Transformer(folder, query_expansion=eight if expansion else None)
    dense = Dense(16, 8, bias=False, activation_function=nn.Identity(), **OF_TOKENS)
    mask, normal = MultiVectorMask(skiplist_words=[".", ","]), Normalize(module_input_name="token_embeddings")
    return MultiVectorEncoder(modules=[bert, dense, mask, normal], device="cpu").eval()


OF_TOKENS = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}


def texts(model, rows, names=3):
    """Features of a query and its documents; of row 2 the negative is punctuation alone."""
    features = []
    for name in range(names):
        lines = []
        for row in rows:
            g = torch.Generator().manual_seed(10 * row + name)
            drawn = torch.randint(len(WORDS), (int(torch.randint(2, 9, (1,), generator=g)),), generator=g)
            lines.append(" ".join(WORDS[n] for n in drawn) if (row, name) != (2, 2) else ". ,")
        task = "query" if name == 0 else "document"
        features.append({**model.preprocess(lines, task=task), "task": task})
    return features


def sentence_transformers(name, model, **settings):
    losses = library("sentence_transformers", "6.0")
    from sentence_transformers.multi_vector_encoder import scoring

    if "function" in settings:
        settings["similarity_fct"] = getattr(scoring, settings.pop("function"))
    if "normalize" in settings:
        settings["similarity_fct"] = functools.partial(
            scoring.colbert_scores, length_normalize=settings.pop("normalize")
        )
    return getattr(losses, name.split(",")[0])(model, **settings)


RANKING, CACHED = "MultiVectorMultipleNegativesRankingLoss", "CachedMultiVectorMultipleNegativesRankingLoss"
SENTENCE_TRANSFORMERS = {
    RANKING: {"scale": 2.0},
    RANKING + ", in chunks": {"mini_batch_size": 2, "score_mini_batch_size": 2},
    RANKING + ", mean": {"function": "mean_colbert_scores", "scale": 8.0},
    RANKING + ", normalized": {"normalize": True},
    CACHED: {"mini_batch_size": 2, "scale": 3.0},
    CACHED + ", tokens": {"mini_batch_num_tokens": 12, "score_mini_batch_size": 3},
    "MultiVectorDistillKLDivLoss": {"temperature": 0.5},
    "MultiVectorDistillKLDivLoss, mean": {"function": "mean_colbert_kd_scores"},
    "MultiVectorMarginMSELoss": {},
    "MultiVectorMarginMSELoss, mean": {"function": "mean_colbert_scores_pairwise"},
}


@pytest.mark.slow
@pytest.mark.parametrize("expansion", [False, True])
@pytest.mark.parametrize("name", SENTENCE_TRANSFORMERS)
def test_sentence_transformers(name, expansion):
    library("sentence_transformers", "6.0")
    model, settings, labels = encoder(expansion), SENTENCE_TRANSFORMERS[name], None
    rows = range(5) if RANKING in name else (0, 1, 3, 4)  # an empty document has no margin
    features = texts(model, rows)
    if RANKING not in name:
        labels = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
    own = value_and_gradients(sentence_transformers(name, model, **settings), features, labels)
    ours = with_maxsim(sentence_transformers(name, model, **settings))
    same(value_and_gradients(ours, features, labels), own)


LAST = (range(4), range(4, 6))
NAMES = (RANKING, RANKING + ", in chunks", RANKING + ", mean", CACHED)
RUNS = [(name, EVEN, options) for name in NAMES for options in ({}, RING)]
RUNS += [(name, LAST, {}) for name in (RANKING, CACHED)]


def texts_on_rank(rank, ranks, model):
    results = []
    for name, rows, options in RUNS:
        settings = {**SENTENCE_TRANSFORMERS[name], "gather_across_devices": True}
        loss = with_maxsim(sentence_transformers(name, model, **settings), **options)
        results.append(value_and_gradients(loss, texts(model, rows[rank])))
    return results


class MeanOfRanks(nn.Module):
    """The mean of what ranks of four and two queries have as their means, by the library's scores in one process."""

    def __init__(self, model, scale):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, features):
        from sentence_transformers.multi_vector_encoder.scoring import colbert_scores
        from sentence_transformers.util import stack_padded_token_embeddings

        outputs = [self.model(dict(x), task=x["task"]) for x in features]
        embeddings, masks = ([x[key] for x in outputs] for key in ("token_embeddings", "attention_mask"))
        documents, mask = stack_padded_token_embeddings(embeddings[1:], masks[1:])
        scores = self.scale * colbert_scores(embeddings[0], documents, masks[0], mask)
        losses = F.cross_entropy(scores, torch.arange(6) * (len(features) - 1), reduction="none")
        return (losses[:4].mean() + losses[4:].mean()) / 2


@pytest.mark.slow
def test_sentence_transformers_on_two_ranks_equals_one():
    """Ranks whose last batch is smaller make other numbers of chunks, and none waits for another."""
    library("sentence_transformers", "6.0")
    model = encoder(True)
    for (name, rows, _), results in zip(RUNS, zip(*spawn(texts_on_rank, 2, model), strict=True), strict=True):
        whole = sentence_transformers(name, model, **SENTENCE_TRANSFORMERS[name])
        if rows is LAST:
            whole = MeanOfRanks(model, SENTENCE_TRANSFORMERS[name]["scale"])
        same(mean(results), value_and_gradients(whole, texts(model, range(6))))


def test_pylate_s_masks_by_hand():
    """A masked token has similarity 0 there, and wins over negative ones."""
    scores = MaxSimScores(masked_as_zero=True)
    queries, documents = torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[[[2.0], [3.0]], [[-1.0], [5.0]]]])
    mask = torch.tensor([[[True, True], [True, False]]])
    # [2, 3]: 3 for the first token, -2 for the second; [-1, masked]: 0 and 1.
    assert scores(queries, documents, None, mask).tolist() == [[1.0, 1.0]]
    assert MaxSimScores()(queries, documents, None, mask).tolist() == [[1.0, 0.0]]
    assert scores(queries, documents, None, mask.long()).tolist() == [[1.0, 1.0]]
    assert scores(queries, documents, torch.tensor([[True, False]]), mask).tolist() == [[3.0, 0.0]]
    empty = MaxSimScores(empty=-7.0)(queries, documents, None, mask & torch.tensor([[[True], [False]]]))
    assert empty.tolist() == [[1.0, -7.0]]


def named(name, module="pylate.scores", **attributes):
    function = lambda *_: None  # noqa: E731
    function.__name__, function.__module__ = name, module
    loss = nn.Module()
    loss.__dict__.update(attributes)
    return loss, function


def test_what_it_takes_the_place_of():
    loss, function = named("colbert_kd_scores")
    loss.score_metric = functools.partial(function, backend="torch")
    assert with_maxsim(loss, recompute=True) is loss
    assert loss.score_metric == MaxSimScores("own", masked_as_zero=True, scorer=Scorer(recompute=True))

    library = "sentence_transformers.multi_vector_encoder.scoring.colbert"
    loss, function = named("colbert_scores", library, gather_across_devices=True, score_mini_batch_size=4)
    loss.similarity_fct = functools.partial(function, chunk_elements=100, length_normalize=True)
    with_maxsim(loss)
    assert loss.similarity_fct == MaxSimScores("all", True, empty=-1e9, across_ranks=True)
    assert loss.gather_across_devices is False and loss.score_mini_batch_size > 2**30


def test_what_it_refuses():
    loss, function = named("xtr_scores")
    with pytest.raises(ValueError, match=r"cannot change a Module that scores by torch\.nn\..*: it takes"):
        with_maxsim(loss)
    loss.score_metric = function
    with pytest.raises(ValueError, match=r"a Module that scores by pylate\.scores\.xtr_scores: it takes"):
        with_maxsim(loss)
    loss.score_metric = functools.partial(named("colbert_kd_scores")[1], margin=2)
    with pytest.raises(ValueError, match="colbert_kd_scores with margin: it takes") as caught:
        with_maxsim(loss)
    assert "\n" not in str(caught.value)
    loss.score_metric = named("colbert_kd_scores")[1]
    with pytest.raises(ValueError, match="exchange='mail' is unknown"):
        with_maxsim(loss, exchange="mail")
    with pytest.raises(ValueError, match="documents='some' is unknown; give all, own or pair"):
        MaxSimScores("some")
    with pytest.raises(ValueError, match="across_ranks=True takes all documents, not documents='own'"):
        MaxSimScores("own", across_ranks=True)
