"""Shares of the model on two processes, played by two threads that sum for real, must equal the
whole model."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from dsv4_plugin.checkpoint.load import load_checkpoint
from dsv4_plugin.checkpoint.tiny import tiny_config, write_tiny
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.model.linear import Activation
from dsv4_plugin.model.replicas import ReplicaError, RowsOfAll
from dsv4_plugin.parallel import Group, Parallel, ParallelError, Replicas, StepRows
from dsv4_plugin.runtime import Engine

SIZE = 2
LENGTH = 270


class Summing:
    """all_reduce among threads: every rank waits for all, then adds in the order of ranks."""

    def __init__(self):
        self._barrier = threading.Barrier(SIZE)
        self._parts: list = [None] * SIZE

    def group(self, rank: int) -> Group:
        def all_reduce(x):
            self._parts[rank] = x
            self._barrier.wait(60)
            total = sum(self._parts)
            self._barrier.wait(60)
            return total

        def all_gather(x):
            self._parts[rank] = x
            self._barrier.wait(60)
            parts = torch.stack(self._parts)
            self._barrier.wait(60)
            return parts

        def reduce_scatter(x):
            return all_reduce(x)[Group(rank, SIZE).slice(x.shape[0])]

        return Group(rank, SIZE, all_reduce, all_gather=all_gather, reduce_scatter=reduce_scatter)


LAYOUTS = {
    "tensor": ("attention", "expert_tensor", "shared", "vocab"),
    "expert": ("expert",),
    "tensor and expert": ("attention", "expert", "shared", "vocab"),
    "attention": ("attention",),
    "expert_tensor": ("expert_tensor",),
    "shared": ("shared",),
    "vocab": ("vocab",),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Three layers of all kinds; every split leaves whole blocks of 128."""
    path = tmp_path_factory.mktemp("parallel") / "model"
    write_tiny(
        path,
        tiny_config(
            layers=3,
            hidden=128,
            experts=4,
            experts_per_token=2,
            heads=4,
            o_groups=2,
            intermediate=256,
            index_topk=8,
            compress_ratios=[4, 128, 0],
        ),
        seed=2,
    )
    return path


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return torch.randint(2, 320, (LENGTH,), generator=torch.Generator().manual_seed(8)).tolist()


def build(
    directory, parallel: Parallel = Parallel(), precision: Precision = Precision.EXACT
) -> DeepseekV4:
    model = DeepseekV4(Geometry.from_dir(directory), precision, parallel)
    load_checkpoint(model, directory)
    return model


@pytest.fixture(scope="module")
def whole(directory, prompt):
    engine = Engine(build(directory))
    return engine.score(prompt), engine.score_draft(prompt)


def on_both_ranks(work) -> list:
    """Results of work(rank, summing) in one thread a rank."""
    summing, results, errors = Summing(), [None] * SIZE, []

    def run(rank: int) -> None:
        torch.set_num_threads(1)  # holds for the thread that says it: all ranks sum alike
        try:
            results[rank] = work(rank, summing)
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            errors.append(error)
            summing._barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def score(
    directory, groups: tuple[str, ...], prompt: list[int], change=lambda rank, model: None
) -> list:
    """(logits, MTP logits) on each rank."""

    def work(rank: int, summing: Summing):
        model = build(directory, Parallel(**{name: summing.group(rank) for name in groups}))
        change(rank, model)
        engine = Engine(model, page_seed=3)
        return engine.score(prompt, [130, 1, 139]), engine.score_draft(prompt, [270])

    return on_both_ranks(work)


def joined(results: list, groups: tuple[str, ...], which: int) -> torch.Tensor:
    if "vocab" in groups:
        return torch.cat([result[which] for result in results], -1)
    # What each rank computes for itself follows, in the last bits, where its tensors lie (MKL).
    assert torch.allclose(results[0][which], results[1][which], rtol=0, atol=1e-5)
    return results[0][which]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_one(directory, prompt, whole, layout):
    results = score(directory, LAYOUTS[layout], prompt)
    for which in (0, 1):
        d = (joined(results, LAYOUTS[layout], which) - whole[which]).abs().max()
        # Other sums of fp32 products and one more addition per layer; logits reach 10.
        assert d <= 1e-4, ("MTP" if which else "backbone", d)


def test_two_ranks_choose_the_tokens_of_one(directory, prompt):
    """Each rank sees the logits of its half of the vocabulary alone."""

    def work(rank: int, summing: Summing):
        model = build(directory, Parallel(vocab=summing.group(rank)))
        return Engine(model, page_seed=3).generate([prompt[:40], prompt[40:97]], 6)

    want = Engine(build(directory), page_seed=3).generate([prompt[:40], prompt[40:97]], 6)
    assert on_both_ranks(work) == [want, want]


@pytest.mark.parametrize("layout, sums", [("tensor", 1), ("tensor and expert", 1), ("expert", 1)])
def test_experts_are_summed_over_processes_once(directory, layout, sums):
    """Routed and shared shares are added before they cross processes."""
    sent = []

    def all_reduce(x):
        sent.append(x.dtype)
        return x

    model = build(directory, Parallel(**{n: Group(0, 2, all_reduce) for n in LAYOUTS[layout]}))
    step = SimpleNamespace(token_ids=torch.arange(5), rows=None)
    model.layers[0].ffn(Activation(torch.randn(5, 128)), step)
    assert sent == [torch.float32] * sums


def test_shares_hold_their_part_of_every_tensor(directory):
    one = build(directory)
    two = [
        build(directory, Parallel(**{name: Group(rank, SIZE) for name in LAYOUTS["tensor"]}))
        for rank in range(SIZE)
    ]
    attention = [model.layers[0].attn for model in two]
    assert torch.equal(torch.cat([a.attn_sink for a in attention]), one.layers[0].attn.attn_sink)
    for name, axis in (("wq_b", 0), ("wo_a", 0), ("wo_b", 1)):
        got = torch.cat([getattr(a, name).weight for a in attention], axis)
        assert torch.equal(got, getattr(one.layers[0].attn, name).weight), name
    for name, axis in (("w1", 1), ("w3", 1), ("w2", 2)):
        got = torch.cat([getattr(model.layers[0].ffn.experts, name).weight for model in two], axis)
        assert torch.equal(got, getattr(one.layers[0].ffn.experts, name).weight), name


def sink_of_rank_zero(rank, model):
    for layer in model.layers:
        layer.attn.attn_sink.data.copy_(torch.tensor([4.5, 2.5]))


def experts_of_rank_zero(rank, model):
    for layer in model.layers:
        layer.ffn.experts.first = 0


@pytest.mark.parametrize(
    "layout, mistake", [("attention", sink_of_rank_zero), ("expert", experts_of_rank_zero)]
)
def test_a_wrong_share_shows(directory, prompt, whole, layout, mistake):
    results = score(directory, LAYOUTS[layout], prompt, mistake)
    assert (joined(results, LAYOUTS[layout], 0) - whole[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    "group, message",
    [
        ("attention", "parallel size 3 does not divide num_attention_heads 4"),
        ("expert", "parallel size 3 does not divide n_routed_experts 4"),
        (
            "shared",
            "parallel size 3 does not divide moe_intermediate_size 256 in whole blocks of 128",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(directory, group, message):
    with pytest.raises(ParallelError, match=message):
        DeepseekV4(Geometry.from_dir(directory), Precision.EXACT, Parallel(**{group: Group(0, 3)}))


# -- attention in replicas, each with rows of its own

REPLICAS = {
    "experts by width": ("expert_tensor",),
    "experts by number": ("expert",),
}
CHUNKS = ([130, 1, 139], [57, 1, 40])
"""Rows of each replica in each step, all different but the second, which is gathered evenly."""


@pytest.fixture(scope="module")
def prompts(prompt) -> tuple[list[int], list[int]]:
    return prompt, prompt[::-1][: sum(CHUNKS[1])]


@pytest.fixture(scope="module")
def whole_of_each(directory, prompts):
    model = build(directory)
    return [Engine(model).score(prompt) for prompt in prompts]


def replicas(summing, rank: int) -> Replicas:
    """This rank as a replica of its own; what each has is exchanged before every step."""
    everybody = summing.group(rank)

    def rows(own: int) -> StepRows:
        counts = everybody.all_gather(torch.tensor([own, 0])).tolist()
        return StepRows(tuple(count for count, _ in counts), max(counts)[0] > 1)

    return Replicas(rank, SIZE, everybody, rows)


def score_in_replicas(directory, groups, prompts, chunks) -> list[torch.Tensor]:
    """Logits of each replica's own prompt, in as many steps as the others take."""

    def work(rank: int, summing: Summing):
        own = {name: summing.group(rank) for name in groups}
        model = build(directory, Parallel(**own, replicas=replicas(summing, rank)))
        return Engine(model, page_seed=3).score(prompts[rank], chunks[rank])

    return on_both_ranks(work)


@pytest.mark.parametrize("layout", REPLICAS)
def test_replicas_equal_one_process(directory, prompts, whole_of_each, layout):
    for got, want in zip(
        score_in_replicas(directory, REPLICAS[layout], prompts, CHUNKS), whole_of_each, strict=True
    ):
        assert (got - want).abs().max() <= 1e-4  # as for two ranks of one


def test_a_replica_without_rows_takes_every_step(directory, prompts, whole_of_each):
    def work(rank: int, summing: Summing):
        parallel = Parallel(expert=summing.group(rank), replicas=replicas(summing, rank))
        engine = Engine(build(directory, parallel), page_seed=3)
        if rank == 0:
            return engine.score(prompts[0], CHUNKS[0])
        return [engine.logits(engine.forward([])) for _ in CHUNKS[0]]

    got, nothing = on_both_ranks(work)
    assert (got - whole_of_each[0]).abs().max() <= 1e-4
    assert [tuple(each.shape) for each in nothing] == [(0, got.shape[1])] * 3


@pytest.mark.parametrize(("counts", "own"), [((3, 3), 3), ((3, 3), 2), ((4, 1), 3), ((0, 2), 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_replica_sends_arrives_bit_for_bit(counts, own, dtype):
    """Rows of padding that a replica promised and does not have are nobody's."""

    def work(rank: int, summing: Summing):
        torch.manual_seed(rank)
        count = own if rank == 0 else counts[1]
        x = torch.randn(count, 6).to(dtype)
        x[:1, 0] = -0.0
        weights, experts = torch.rand(count, 2) * 1e-44, torch.randint(0, 1 << 20, (count, 2))
        experts[1:] = -1
        step = StepRows(counts, False)
        rows = RowsOfAll(Replicas(rank, SIZE, summing.group(rank), lambda _: step), Group(), count)
        own_part = torch.full((count, 6), 10.0 * (rank + 1))
        everything = rows.gather(x, weights, experts)
        shares = everything[0].float() * (rank + 1)
        return (x, weights, experts), everything, rows.scatter(shares, own_part)

    results = on_both_ranks(work)
    here = [slice(0, own), slice(counts[0], counts[0] + counts[1])]
    for _, everything, _ in results:
        assert everything[0].shape[0] == sum(counts)
        assert (everything[2][own : counts[0]] == -1).all()
        for (sent, _, _), where in zip(results, here, strict=True):
            for got, want in zip(everything, sent, strict=True):
                assert torch.equal(got[where].view(torch.uint8), want.view(torch.uint8))
    for rank, (sent, _, summed) in enumerate(results):
        want = sent[0].float() * 3 + 10 * (rank + 1)  # of both processes, and its own once
        assert torch.allclose(summed, want, rtol=1e-6, atol=1e-6)


def test_more_rows_than_the_others_were_told_are_an_error():
    told = Replicas(1, 2, Group(1, 2), lambda own: StepRows((5, 3), False))
    with pytest.raises(ReplicaError, match="replica 1 has 4 rows and told the others 3"):
        RowsOfAll(told, Group(), 4)
