"""What a forward pass holds at one time."""

import torch
from fused import fused, some_ids

from eval.memory import PeakMemory, weight_bytes


def test_the_peak_is_what_was_there_at_one_time():
    given = torch.ones(1000)
    with PeakMemory() as memory:
        x = given + 1
        y = x * 2
        del x
        z = y.view(10, 100)[1:]  # no storage of its own
        y.add_(given)
        del y
        assert memory.now == 4000
        del z
        assert memory.now == 0
    assert memory.peak == 8000


def test_a_model_takes_more_for_more_rows_and_nothing_is_left():
    model = fused()
    peaks = []
    for rows in (1, 4):
        with torch.inference_mode(), PeakMemory() as memory:
            model(some_ids(rows), use_cache=False)
        assert memory.now == 0
        peaks.append(memory.peak)
    assert 2 * peaks[0] < peaks[1] < 5 * peaks[0]
    assert memory.peak > model(some_ids(4)).logits.nbytes


def test_shared_weights_are_counted_once():
    host = fused(host="gemma2-2b").host
    assert host.lm_head.weight is host.model.embed_tokens.weight
    assert weight_bytes(host) == sum(x.nbytes for x in (*host.parameters(), *host.buffers()))
