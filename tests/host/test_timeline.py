"""What a server says of its start while it starts."""

from __future__ import annotations

import logging

import torch

from dsv4_plugin.host import timeline


def test_parts_end_in_their_order_and_nothing_is_added_after_the_last(monkeypatch):
    clock = iter((12.0, 15.5, 20.0))
    monkeypatch.setattr(timeline.time, "time", lambda: next(clock))
    line = timeline.Timeline(began=10.0)
    line.end("import")
    line.end("weights")
    line.end("first answer", last=True)
    line.end("weights")  # loaded again while it serves
    assert line.seconds == {"import": 2.0, "weights": 3.5, "first answer": 4.5}
    assert line.text().endswith("; 10.0 s in all")


def test_weights_are_counted_while_they_come(monkeypatch, caplog):
    """A tensor of 1 GB every 4 seconds."""
    now = [0.0]
    monkeypatch.setattr(timeline.time, "monotonic", lambda: now[0])
    tensors = [(str(n), torch.empty(10**9, dtype=torch.int8, device="meta")) for n in range(8)]
    with caplog.at_level(logging.INFO):
        for (name, tensor), given in zip(timeline.told(tensors, 8 * 10**9), tensors):
            assert name == given[0] and tensor is given[1]
            now[0] += 4
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "weights  38 %, 3.0 of 8.0 GB, 0.25 GB/s",
        "weights  75 %, 6.0 of 8.0 GB, 0.25 GB/s",
        "8.00 GB of weights read in 32.0 s, 0.25 GB/s",
    ]
