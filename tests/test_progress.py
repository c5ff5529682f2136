"""What long work says meanwhile, and the time left."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from disam_theory import progress
from disam_theory.progress import Line, Parts, Spectra, duration
from tests.drawn_images import convolutional, draw


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def on_a_terminal(monkeypatch, columns=120):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)


def shown(capsys):
    return capsys.readouterr().err.split("\r\033[K")[1:]


def test_durations():
    assert [duration(s) for s in (0.4, 59.9, 61, 36_610)] == ["0:00:00", "0:00:59", "0:01:01", "10:10:10"]


def test_a_terminal_has_one_line_in_place(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    line = Line()
    for what in ("one", "two"):
        line.show(what)
    progress.say("left out")
    assert capsys.readouterr().err == "\r\033[Kone\r\033[Ktwo\r\033[Kdisam-theory: left out\n"


def test_a_line_does_not_wrap(monkeypatch, capsys):
    on_a_terminal(monkeypatch, 8)
    Line().show("1234567890")
    assert shown(capsys) == ["1234567"]


def test_a_log_has_a_line_a_minute(capsys):
    clock = Clock()
    line = Line(clock)
    for clock.now in (100.0, 130.0, 161.0, 200.0, 221.0, 230.0):
        line.show(f"at {clock.now:.0f}")
    progress.wipe()
    assert capsys.readouterr().err == "disam-theory: at 161\ndisam-theory: at 221\n"


def test_what_is_left_is_the_mean_of_what_is_done():
    clock = Clock()
    parts = Parts(4, clock)
    assert str(parts) == ""
    clock.now = 110.0
    parts.finished()
    assert str(parts) == ", 0:00:30 left by estimate"
    clock.now = 114.0
    assert str(parts) == ", 0:00:26 left by estimate"
    clock.now = 160.0
    assert str(parts) == ", 0:00:00 left by estimate"
    parts.finished()
    assert str(parts) == ", 0:01:00 left by estimate"
    parts.finished()
    parts.finished()
    assert str(parts) == ""


def test_eigenvalues_are_left_by_the_fall_of_the_residual_and_at_most_by_the_limit(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    clock = Clock()
    show = Spectra(Line(), "model.pt: ", 1e-4, 50, clock)
    clock.now = 104.0
    show(4, 4, float("inf"))
    clock.now = 120.0
    show(20, 4, 1e-1)  # a quarter of the way in 20 s
    clock.now = 130.0
    show(30, 2, 1e-5)
    assert shown(capsys) == [
        "model.pt: 4 products in all, residual inf of 1e-04, at most 0:03:16",
        "model.pt: 20 products in all, residual 1e-01 of 1e-04, 0:01:00 left by estimate, at most 0:03:12",
        "model.pt: 30 products in all, residual 1e-05 of 1e-04, 0:00:00 left by estimate, at most 0:01:34",
    ]


def test_the_estimate_is_never_above_the_most():
    clock, said = Clock(), []

    class Kept(Line):
        def show(self, what):
            said.append(what)

    show = Spectra(Kept(), "", 1e-3, 10, clock)
    for step, error in itertools.product(range(1, 11), (0.999, 0.5, 0.0)):
        clock.now = 100.0 + step
        show(step, 1, error)
    for line in said:
        if "by estimate" in line:
            left = line.partition("e-03, ")[2][:7]
            assert left <= line.partition("at most ")[2]
    assert any("by estimate" in line for line in said)


def test_parts_are_gone_through_with_the_time_left_by_their_costs(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    clock = Clock()
    line = Line(clock)
    line.heading = lambda: f"at {clock.now:.0f}: "
    for name in line.through("domain", ["a", "b", "all"], [1, 2, 3]):
        clock.now += {"a": 10.0, "b": 26.0, "all": 36.0}[name]
    assert list(line.through("draw", range(2))) == [0, 1]
    assert shown(capsys) == [
        "at 100: domain 1 of 3",
        "at 110: domain 2 of 3, 0:00:50 left by estimate",
        "at 136: domain 3 of 3, 0:00:36 left by estimate",
        "at 172: draw 1 of 2",
        "at 172: draw 2 of 2, 0:00:00 left by estimate",
    ]


def test_in_a_log_parts_are_told_of_once_a_minute(capsys):
    clock = Clock()
    for _ in Line(clock).through("draw", range(9)):
        clock.now += 25.0
    said = [f"disam-theory: draw {n} of 9, 0:0{left} left by estimate" for n, left in ((4, "2:30"), (7, "1:15"))]
    assert capsys.readouterr().err.splitlines() == said


def test_an_audit_on_a_terminal_tells_the_time_left_in_each_stage(tmp_path):
    data = draw(tmp_path / "data", domains=("cartoon", "photo", "sketch"))
    torch.save(convolutional().state_dict(), tmp_path / "c.pt")
    command = ["audit", "c.pt", "--model", "tests.drawn_images:convolutional", "--data", str(data), "--full"]
    command += ["--image-size", "8", "-k", "1", "--max-samples", "8", "--unseen", "sketch"]
    screen, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "disam_theory", *command],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "100"},
    )
    os.close(terminal)
    lines = _written(screen).split("\r\x1b[K")
    assert process.wait() == 0
    told = {found[1] for line in lines if (found := re.match(r"(.*) \d+ of \d+, \d:\d\d:\d\d left by estimate", line))}
    measures = ("trace", "worst case", "average case", "gradient variance", "ascent step", "perturbation", "warning")
    others = ("outcomes of domain", "draw for the bounds", "sampling error", "density", "point of the slice")
    assert told == {"image", *(f"c.pt: {stage}" for stage in (*measures, *others))}
    eigenvalues = [line for line in lines if line.startswith(("c.pt: eigenvalues: ", "c.pt: eigenvalues of sketch: "))]
    assert len({line.partition(": ")[2].partition(": ")[0] for line in eigenvalues if "left by estimate" in line}) == 2


def _written(screen):
    """All that is written to a terminal until its last writer ends."""
    written = bytearray()
    while True:
        try:
            piece = os.read(screen, 4096)
        except OSError:  # what Linux gives for the end
            piece = b""
        if not piece:
            os.close(screen)
            return written.decode()
        written += piece
