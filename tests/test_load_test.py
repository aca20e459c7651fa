"Clients of the server."
import pytest

import extras.server
from extras.load_test import quantiles
from tests.helpers import one_line, run

pytest_plugins = ["tests.helpers"]  # its fixtures


def test_bench_serves_clients_of_its_own(trained, monkeypatch):
    import bench
    monkeypatch.setattr(extras.server.Handler, "log_message", lambda *_: None)
    monkeypatch.setattr(bench, "clock", lambda work, *_: work() or 1.0)  # once is enough here
    ran = run("bench", "--what=serve", f"--out_dir={trained[0]}", "--device=cpu", "--clients=3", "--steps=2",
              main=bench.main)
    assert ran.code == 0, ran.err
    assert set(ran.result["clients"]) == {"3"} and set(ran.result["tokens_per_s"]) == {"offline", "generate"}
    for row in ran.result["clients"].values():
        assert row["tokens_per_s"] > 0 and 0 < row["first_token_ms"][0] <= row["first_token_ms"][1]
    # What goes wrong at a client, in its own process, ends the measurement in one line, and it does not wait for ever.
    monkeypatch.setattr(extras.server.Handler, "do_POST", lambda self: self.send_error(507))
    one_line(run("bench", "--what=serve", f"--out_dir={trained[0]}", "--device=cpu", "--clients=1", "--steps=1"), "507")


def test_quantiles_are_the_half_and_the_twentieth_of_the_slowest():
    assert quantiles([i / 1000 for i in range(100, 0, -1)]) == pytest.approx([51, 96])  # milliseconds
