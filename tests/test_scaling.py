"""The simulation of many GPUs, by hand on small numbers, and its page as it prints it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import scaling
from benchmarks.scaling import Job, Machine, Mesh, Shape, Work

H100 = Machine()
TINY = Shape(width=1, layers=3, inner=0, key_width=0, vocabulary=0)  # a layer of 4 weights, 1 more
SLOW = Machine(operations=10, gather=1, reduce=2, nic=1, bandwidth=math.inf, base=0, hop=0,
               far_hop=0, tree_hop=0)  # fmt: skip
ROW = Job(rows=3, prompt=0, answer=1)  # a layer computes one token's 2·4 + 2·1·1 = 10 in a second
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def test_weights_are_those_that_are_published():
    assert scaling.SHAPES["7B"].weights == 6_738_415_616
    assert scaling.SHAPES["70B"].weights == 70_553_706_496


def test_a_ring_by_hand():
    """0.8 GB on 8 GPUs: 8.4 + 7·3.4 µs and 0.7 GB at 350 GB/s; on 16 one hop is far."""
    assert scaling.ring(8e8, 8, H100.gather, H100) == pytest.approx(32.2e-6 + 2e-3)
    assert scaling.ring_latency(16, H100) == pytest.approx((8.4 + 14 * 3.4 + 9.6) * 1e-6)
    one_card = replace(H100, nics=1)
    assert scaling.ring(16, 16, H100.gather, one_card) == pytest.approx(65.6e-6 + 15 / 47e9)
    assert scaling.ring(1e9, 1, H100.gather, H100) == 0


def test_a_sum_over_nodes_is_the_faster_of_ring_and_tree():
    """47 MB on two nodes: 2 hops and 1 ms. 4.7 kB on 128: 254 hops, or 14 of a tree and 0.2 µs."""
    assert scaling.all_reduce(47e6, 2, H100) == pytest.approx(8.4e-6 + 2 * 9.6e-6 + 1e-3)
    assert scaling.all_reduce(4700, 128, H100) == pytest.approx(700e-6 + 2 * 4700 / (0.9 * 47e9))
    assert scaling.all_reduce(1e9, 1, H100) == 0


def test_a_layer_hides_the_next_ones_bytes_by_hand():
    """Two ranks: a layer's 8 bytes are gathered in 4 s, its 16 of gradients summed in 4 s; the rest
    takes a second each way. Six tokens hide that (6 s and 18 s a layer), one does not (1 and 3).
    """
    pair = Mesh(2, 2)
    assert scaling.passes(TINY, ROW, pair, 6, SLOW) == (1 + 4 + 3 * 6, 4 + 3 * 18 + 4 + 1)
    assert scaling.passes(TINY, ROW, pair, 1, SLOW) == (1 + 4 + 2 * 4 + 1, 4 + 2 * 8 + 3 + 4 + 1)


def test_a_step_is_told_apart_by_hand():
    """Three rows on two ranks: the fuller has two. 15 + 31 s, of which 4 · 3 · 2 = 24 s compute; an
    even part would be 18. With 1 s a hop of a ring, seven gathers and sums of 3 layers and the rest
    are longer where they are waited for.
    """
    found = scaling.step(TINY, ROW, Work(0, 1), Mesh(2, 2), SLOW)
    assert found.seconds == 46
    assert found.parts == {
        "steps of rings": 0, "bytes on links": 22, "rows that do not divide": 6, "computing": 18,
    }  # fmt: skip
    assert found.waits_for == "bytes on links" and found.computing == 18 / 46
    hopping = scaling.step(TINY, ROW, Work(0, 1), Mesh(2, 2), replace(SLOW, hop=1.0))
    assert hopping.parts["steps of rings"] == (2 + 2) + (1 + 2 * 2 + 1 + 1)
    twice = scaling.step(TINY, replace(ROW, micro_batch=1), Work(1, 2), Mesh(2, 2), SLOW)
    assert twice.seconds == 2 * (14 + 2 * (14 + 28))
    alone = scaling.step(TINY, replace(ROW, rows=2), Work(0, 1), Mesh(2, 1), SLOW)
    apart = alone.seconds - 24 / 2  # each rank's own copy: sums of 16 and 4 bytes over two nodes
    assert apart == pytest.approx(2 * (max(3, 16) - 3) + 16 + 4)


def test_an_update_reads_and_writes_a_ranks_weights():
    slow = replace(SLOW, bandwidth=104.0)
    step = scaling.step(TINY, ROW, Work(0, 1), Mesh(2, 2), slow)
    assert step.seconds == 46 + 16 * 13 / 2 / 104


def test_decoding_by_hand():
    """One answer on one server of 7B: 13.48 GB of weights and 0.81 of keys and values a token."""
    assert [scaling.decode_share(n) for n in (1, 8, 128, 999)] == [0.55, 0.51, 0.33, 0.33]
    assert scaling.decode_share(16) == pytest.approx(0.48)  # half way from 8 to 32
    seven = scaling.SHAPES["7B"]
    token = (2 * 6_738_415_616 + 4 * 32 * 4096 * 1536) / 2.95e12 / 0.55
    prompt = 1024 * 2 * 6_738_415_616 / (0.36 * 793e12)
    assert scaling.rollout(seven, Job(rows=1), 1, H100) == pytest.approx(1024 * token + prompt)
    assert scaling.rollout(seven, Job(rows=1), 8, H100) == scaling.rollout(
        seven, Job(rows=1), 1, H100
    )
    assert [scaling.servers_width(shape) for shape in scaling.SHAPES.values()] == [1, 4]


def test_ppo_takes_the_parting_that_is_quickest():
    seven = scaling.SHAPES["7B"]
    job = scaling.JOBS["ppo"]
    one = scaling.ppo_iteration(seven, 64, H100, least=8)
    assert one.seconds == one.writing + one.handing + one.learning.seconds
    assert one.overlapped == max(one.writing, one.learning.seconds) + one.handing
    assert one.handing == 2 * seven.weights / 47e9
    trainers = Mesh(64 - one.servers, 64 - one.servers)
    assert one.learning == scaling.step(seven, job, Work(4, 8), trainers, H100)
    for servers in range(8, 57, 8):
        step = scaling.step(seven, job, Work(4, 8), Mesh(64 - servers, 64 - servers), H100)
        assert (
            one.seconds <= scaling.rollout(seven, job, servers, H100) + one.handing + step.seconds
        )


def test_where_it_stops_by_hand():
    """80 GPU-seconds on 8; 96 on 32 are 83 % of that a GPU, 128 on 64 are 63 %."""
    assert scaling.holds_to({8: 10, 16: 5, 32: 3, 64: 2}) == 32
    assert [mesh.shards for mesh in scaling.meshes(64, least=16)] == [64, 32, 16]


def test_beside_a_measurement_of_others():
    """torchtitan, Llama 3.1 8B, 2 x 8,192 tokens a GPU: 5,762 tokens/s a GPU on 8 H100s, 5,605 on
    128 (benchmarks/llama3_h100_202412_torchtitan.md). With the rate of 8, 128 come within 3 %.
    """
    shape = Shape(4096, 32, 14336, 1024, 128256)
    job = Job(rows=2, prompt=0, answer=8192, micro_batch=16384)

    def rate(gpus, machine):
        jobs, mesh = replace(job, rows=2 * gpus), Mesh(gpus, gpus)
        return 16384 / scaling.step(shape, jobs, Work(0, 1), mesh, machine).seconds

    low, high = 1e14, 1e15
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(8, Machine(middle)) < 5762 else (low, middle)
    assert 5605 < rate(128, Machine(low)) < 5605 * 1.03


def test_memory_by_hand():
    """Of 23 weights a rank of two has half; whole are two layers of 4 and what is in none, 11."""
    job = Job(prompt=0, answer=1, micro_batch=10)
    vast = TINY._replace(vocabulary=5)  # 10 of embeddings and head more
    whole = 2 * (11 + 8) + 2 * (11 + 4) + 3 * 4 * 10 + 10 * 16 + 8 * 10 * 5
    assert scaling.held(vast, job, 2) == 12 * 23 / 2 + whole
    both = 2 * (22 + 8) + 2 * (22 + 4) + 2 * 3 * 4 * 10 + 10 * 16 + 8 * 10 * 5
    assert scaling.held(vast, job, 4, learns=2, frozen=2) == 28 * 23 / 4 + both


@pytest.mark.parametrize(
    ("shape", "gib"),
    [
        (Shape(4096, 32, 14336, 1024, 128256), 49),
        (Shape(5120, 48, 13824, 1024, 152064), 89),
        (Shape(5120, 64, 27648, 1024, 152064), 191),
        (Shape(8192, 80, 28672, 1024, 128256), 404),
    ],
)
def test_memory_is_that_of_the_plans(shape, gib):
    """docs/gpus.md, SFT with bfloat16 weights and 8-bit AdamW: micro-batches of 2,048 tokens."""
    job = Job(prompt=0, answer=2048, micro_batch=2048)
    assert scaling.held(shape, job, 1, each=6) / 2**30 == pytest.approx(gib, rel=0.03)


def test_the_page_says_what_the_simulation_says():
    lines = set(PAGE.read_text(encoding="utf-8").splitlines())
    for title, table in scaling.tables().items():
        assert [line for line in table if line not in lines] == [], title
