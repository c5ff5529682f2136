"""Logs that other code wrote: their bytes as TensorBoard and DomainBed write them, what is read, what is refused."""

import csv
import json
import math
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disam_theory.__main__ import main
from disam_theory.convergence import ABSENT, INEQUALITIES, Rows, analyse, fit_rate, row
from disam_theory.errors import UsageError
from disam_theory.imported import COLUMNS, CSV, DOMAINBED, TENSORBOARD, read_imported

EPOCHS = 20
EVENTS = "events.out.tfevents.1700000000.host.1.0"


def crc32c(data):
    """Bit by bit from the polynomial, unlike the reader's table."""
    crc = 0xFFFFFFFF
    for bit in (byte >> k & 1 for byte in data for k in range(8)):
        crc = (crc >> 1) ^ (0x82F63B78 if (crc ^ bit) & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)


def frame(payload):
    length = struct.pack("<Q", len(payload))
    return length + masked(length) + payload + masked(payload)


def varint(value):
    value %= 2**64
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def message(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def simple(value):
    return b"\x15" + struct.pack("<f", value)


def tensor(value, *, form="<f", kind=1, field=5):
    """A scalar as ``add_scalar(..., new_style=True)`` writes it, with the plugin's name beside the tensor."""
    content = b"\x08" + varint(kind) + message(2, b"") + message(field, struct.pack(form, value))
    return message(8, content) + message(9, message(1, message(1, b"scalars")))


def event(step, tag, value):
    wall_time = b"\x09" + struct.pack("<d", 1.7e9 + step)
    counted = b"\x10" + varint(step) if step else b""  # proto3 leaves a zero out
    return frame(wall_time + counted + message(5, message(1, message(1, tag.encode()) + value)))


VERSION = frame(b"\x09" + struct.pack("<d", 1.7e9) + message(3, b"brain.Event:2"))


def losses():
    return [float(np.float32(2 * (epoch + 0.5) ** -0.5)) for epoch in range(EPOCHS)]


def official(scalar=simple):
    """The scalars of the official trainer, epoch by epoch."""
    tags = ("val_lodo_loss", "val_lodo_acc", "unseen_test_sketch_loss", "unseen_test_sketch_acc")
    epochs = [
        event(k, "merged_train_loss", scalar(value)) + b"".join(event(k, tag, scalar(0.5)) for tag in tags)
        for k, value in enumerate(losses())
    ]
    return VERSION + b"".join(epochs)


def domainbed(steps, *, algorithm="ERM", **more):
    return "".join(
        json.dumps(
            {
                "args": {"algorithm": algorithm, "dataset": "VLCS", "test_envs": [0]},
                "env0_in_acc": 0.6,
                "env0_out_acc": 0.5,
                "epoch": step / 40,
                "hparams": {"lr": 5e-05},
                "loss": 3 * (step + 1) ** -0.4,
                "step": step,
                "step_time": 0.5,
                **more,
            }
        )
        + "\n"
        for step in steps
    )


STEPS = [*range(0, 4801, 300), 5000]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def written(name, content):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    return written


def analysed(path, **constants):
    log = read_imported(path)
    return analyse(log.trace(), rows=Rows.counted(log.unit, log.at), **constants)


def run(capsys, *arguments):
    code = main(["rate", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_checksum_is_the_published_one():
    """RFC 3720, B.4, of 32 zeros and of 0 to 31; the frame writer of these tests uses it."""
    assert (crc32c(bytes(32)), crc32c(bytes(range(32)))) == (0x8A9136AA, 0x46DD794E)


@pytest.mark.parametrize(
    "scalar",
    [
        simple,
        tensor,
        lambda value: tensor(value, field=4),
        lambda value: tensor(value, form="<d", kind=2, field=6),
        lambda value: tensor(value, form="<d", kind=2, field=4),
    ],
)
def test_an_official_event_file_gives_the_loss_of_each_epoch(write, scalar):
    log = read_imported(write(EVENTS, official(scalar)))
    assert (log.source, log.unit) == (TENSORBOARD, "epoch")
    assert log.at.tolist() == list(range(EPOCHS))
    assert log.columns["loss"].tolist() == losses()
    assert all(np.isnan(log.columns[name]).all() for name in COLUMNS if name != "loss")
    place, unused = log.notes
    assert "at w_asc for SAM and DISAM and at w for ERM; it is not said which" in place
    assert "unseen_test_sketch_acc, unseen_test_sketch_loss, val_lodo_acc, val_lodo_loss" in unused


def test_an_event_file_is_known_by_its_bytes_too(write):
    assert read_imported(write("renamed", official())).source == TENSORBOARD


def test_other_summaries_and_an_epoch_written_again(write):
    image = message(1, b"samples") + message(4, b"\x08\x01")
    foreign = frame(message(5, message(1, image))) + frame(message(4, b"a graph"))
    log = read_imported(write(EVENTS, official() + foreign + event(3, "merged_train_loss", simple(7.0))))
    assert log.columns["loss"][3] == 7.0
    assert log.columns["loss"][4:].tolist() == losses()[4:]
    assert "1 epoch written more than once; the last counts" in log.notes


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data, at: data[: at + 5], "cut off within record 52"),
        (lambda data, at: data[: at + 20], "cut off within record 52"),
        (lambda data, at: data[:-2], "cut off within record 101"),
        (lambda data, at: data[: at + 30] + b"\xff" + data[at + 31 :], "the checksum of record 52 is wrong"),
        (lambda data, at: data[:at] + b"\xff" + data[at + 1 :], "checksum of the length of record 52 is wrong"),
        (lambda data, at: data[:at] + frame(b"\x0b\x0c") + data[at:], "record 52 is not an event (wire type 3)"),
        (lambda data, at: data[:at] + frame(b"\x2a\x7f") + data[at:], "a field is longer than its message"),
        (lambda data, at: data[:at] + frame(b"\x80" * 12) + data[at:], "a number without its end"),
    ],
)
def test_what_comes_before_a_damage_is_used_and_it_is_said(write, capsys, damage, said):
    data = official()
    at = data.index(event(10, "merged_train_loss", simple(losses()[10])))
    log = read_imported(write(EVENTS, damage(data, at)))
    assert log.columns["loss"].tolist() == (losses() if "101" in said else losses()[:10])
    code, out, err = run(capsys, EVENTS)
    assert (code, err) == (0, "")
    assert f"{said}" in out
    assert "what comes before it is used" in out


def test_results_of_domainbed(write):
    log = read_imported(write("results.jsonl", domainbed(STEPS)))
    assert (log.source, log.unit, log.algorithm) == (DOMAINBED, "step", "ERM")
    assert log.at.tolist() == STEPS
    assert log.columns["loss"].tolist() == [3 * (step + 1) ** -0.4 for step in STEPS]
    assert "loss is the mean over the steps since the row before" in log.notes
    assert "not used, as no inequality has it: env0_in_acc, env0_out_acc" in log.notes


def test_domainbed_run_again_cut_off_and_with_a_penalty(write):
    log = read_imported(write("results.jsonl", domainbed(STEPS[:4]) + domainbed(STEPS[:9]) + '{"args": {'))
    assert log.at.tolist() == STEPS[:9]
    assert "the file holds 2 runs, one after the other; the last is used" in log.notes
    assert "line 14 is cut off or damaged; the 13 before it are used" in log.notes
    log = read_imported(write("results.jsonl", domainbed(STEPS, algorithm="VREx", nll=0.25, penalty=9.0)))
    assert set(log.columns["loss"]) == {0.25}
    assert log.notes[0] == "nll is the mean over the steps since the row before"
    log = read_imported(write("results.jsonl", domainbed(STEPS, algorithm="IRM")))
    assert log.notes[0].endswith("IRM's may hold a penalty, or be at w_asc")


def test_csv_with_every_column_any_order_and_empty_cells(write):
    text = "\ufeff# a comment\nphi,step, loss ,loss_ascent,lr,grad_norm,grad_norm_ascent,accuracy\n"
    text += "0.5,0,2.0,2.5,0.1,1.0,1.5,0.3\n,1,1.0,,0.2,nan,inf,0.4\n"
    log = read_imported(write("log.csv", text))
    assert (log.source, log.unit, log.at.tolist()) == (CSV, "step", [0, 1])
    first = {name: values[0] for name, values in log.columns.items()}
    assert first == {"loss": 2, "loss_ascent": 2.5, "grad_norm": 1, "grad_norm_ascent": 1.5, "lr": 0.1, "phi": 0.5}
    assert [name for name, values in log.columns.items() if math.isnan(values[1])] == [
        *("loss_ascent", "grad_norm", "grad_norm_ascent", "phi")
    ]
    assert log.notes == ("not used, as no inequality has it: accuracy", "4 cells without a finite number")


def test_csv_gives_the_rates_and_gamma_but_no_inequality(write):
    t = np.arange(1, 301)
    lines = [f"{k},{0.5 * k**-0.5},{k**-0.3},{k**-0.4},{0.2 * k**-0.5},{k**-0.6}\n" for k in t]
    path = write("log.csv", "step,lr,grad_norm,grad_norm_ascent,phi,loss\n" + "".join(lines))
    found = analysed(path, smoothness=2.0)
    exponents = [found.rates[name].exponent for name in ("at_w", "at_ascent", "loss")]
    assert exponents == pytest.approx([0.6, 0.8, 0.6], abs=0.02)
    assert np.allclose(found.series["gamma"][:-1], 0.4 * np.sqrt(t[:-1] / t[1:]))  # the angle to the next step
    assert found.gradient_bound == 1.0
    assert {finding.verdict for finding in found.findings.values()} == {ABSENT}
    assert found.findings["eq18"].why == "there is no losses_ascent in the file"
    assert "does not say by which rule" in found.findings["corrected_sum"].why
    assert [name for name, held in found.held.items() if not held] == ["beta"]


def test_the_last_row_of_a_csv_cut_off_is_left_out(write):
    log = read_imported(write("log.csv", "epoch,loss,lr\n1,2.0,0.1\n2,1.0,0.1\n3,0."))
    assert log.at.tolist() == [1, 2]
    assert log.notes == ("line 4 is cut off; the rows before it are used",)


def test_an_angle_is_not_used_where_a_row_is_of_several_steps(write):
    log = read_imported(write("log.csv", "step,loss,lr,phi\n1,2.0,0.1,0.2\n2,1.9,0.1,0.2\n4,1.8,0.1,0.2\n"))
    assert np.isnan(log.columns["phi"]).all()
    assert "phi is not used, as a row is of several steps" in log.notes


def averages(rows, exponent, steps_a_unit):
    """Exact means of t^-a over each row's steps."""
    ends, starts = (np.rint(edge * steps_a_unit).astype(int) for edge in (rows.ends, rows.starts))
    total = np.append(0, np.cumsum(np.arange(1.0, ends[-1] + 1) ** -exponent))
    return (total[ends] - total[starts]) / (ends - starts)


EPOCH_ROWS, STEP_ROWS = Rows.counted("epoch", np.arange(20.0)), Rows.counted("step", np.array(STEPS, dtype=float))


def test_rows_start_where_the_one_before_ends():
    assert STEP_ROWS.starts[:3].tolist() == [0, 1, 301]
    assert STEP_ROWS.ends[[0, 1, -1]].tolist() == [1, 301, 5001]
    later = Rows.counted("step", np.array([1000.0, 1100.0]))
    assert later.starts.tolist() == [900, 1000]
    assert later.logs[1] == pytest.approx(np.log(np.arange(1001, 1101)).mean(), abs=1e-9)
    assert EPOCH_ROWS.logs[2] == pytest.approx(np.log((np.arange(2 * 10**6, 3 * 10**6) + 0.5) / 10**6).mean(), abs=1e-9)


@pytest.mark.parametrize(("rows", "steps"), [(EPOCH_ROWS, 400), (STEP_ROWS, 1)])
def test_averages_of_a_power_law_give_its_exponent_with_an_interval_that_covers(rows, steps):
    means = averages(rows, 0.5, steps)
    assert fit_rate(means, rows=rows, of="loss").exponent == pytest.approx(0.5, abs=0.1)
    rng = np.random.default_rng(0)
    rates = [fit_rate(means * np.exp(0.1 * rng.standard_normal(len(means))), rows=rows) for _ in range(100)]
    fitted = [rate for rate in rates if not rate.why]
    assert len(fitted) >= 90
    assert np.mean([rate.low <= 0.5 <= rate.high for rate in fitted]) > 0.88
    assert np.median([rate.high - rate.low for rate in fitted]) < 1.0


def test_a_row_counts_by_its_length():
    """Every other row is a single step and does not fall at all; long rows are 99 times as much."""
    rows = Rows("step", np.cumsum(np.tile([99.0, 1.0], 200)))
    values = averages(rows, 0.5, 1)
    values[1::2] = values[0]
    assert fit_rate(values, rows=rows).exponent == pytest.approx(0.5, abs=0.06)


def test_the_loss_is_fitted_above_its_minimum(write):
    lines = "".join(f"{k},{0.7 + (k - 0.5) ** -0.5}\n" for k in range(1, 101))
    path = write("log.csv", "epoch,loss\n" + lines)
    assert analysed(path).rates["loss"].why.startswith("it has come down to a floor near 0.69")
    assert analysed(path, minimum=0.7).rates["loss"].exponent == pytest.approx(0.5, abs=0.05)
    assert "below the minimum 0.9; give a lower one" in analysed(path, minimum=0.9).rates["loss"].why


def test_the_command_says_what_each_log_gives(write, capsys, tmp_path):
    write(EVENTS, official())
    write("results.jsonl", domainbed(STEPS))
    write("log.csv", "epoch,grad_norm,lr\n1,2.0,0.1\n2,1.0,0.1\n")
    code, out, err = run(capsys, EVENTS, "results.jsonl", "log.csv", "--out", "o")
    assert (code, err) == (0, "")
    head, _, *lines = out.split("\n\n")[0].splitlines()
    assert head.endswith("rate of L")
    spans = ("20 to epoch 20", "18 to step 5001", "2 to epoch 2")
    assert all(span in line for span, line in zip(spans, lines, strict=True))
    assert all(line.count("]") == 1 for line in lines[:2])  # the rate of the loss, with its interval
    assert "TensorBoard events give of the theorem's quantities: L_p [" in out
    absent = "|grad L(w)|, |grad L(w_asc)| and so G, eta, Gamma, beta; nor L, rho and L_min"
    assert f"DomainBed results do not give: {absent}" in out
    assert "CSV columns give of the theorem's quantities: |grad L(w)|, eta [" in out
    assert "no inequality can be evaluated, and the rate of L tests none" in out
    assert "one step, sum, average cannot be had: there is no grad_norm and no grad_norm_ascent" in out
    document = json.loads((tmp_path / "o/rate.json").read_text())
    assert [r["source"] for r in document["rows"]] == [TENSORBOARD, DOMAINBED, CSV]
    first = document["rows"][0]
    assert (first["has_training_loss"], first["has_gradient_at_w"], first["unit"]) == (True, False, "epoch")
    assert first["rate_loss_low"] < 0.5 < first["rate_loss_high"]
    assert [first[f"{name}_verdict"] for name in INEQUALITIES] == [ABSENT] * 6
    assert list(document["notes"]) == [EVENTS, "results.jsonl", "log.csv"]
    series = list(csv.DictReader((tmp_path / "o/series.csv").read_text().splitlines()[1:]))
    assert [int(line["T"]) for line in series if line["trace"] == "results.jsonl"] == [step + 1 for step in STEPS]
    assert (tmp_path / "o/rate.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (EVENTS, b"", "there are no scalars in it"),
        (EVENTS, VERSION, "there are no scalars in it"),
        (EVENTS, b"no events at all", "the checksum of the length of record 1 is wrong"),
        (
            EVENTS,
            VERSION + event(1, "train/loss", simple(1.0)),
            "no merged_train_loss, the official trainer's training",
        ),
        (EVENTS, VERSION + event(1, "a\nb", simple(1.0)), r"scalars are a\nb"),
        (EVENTS, event(-1, "merged_train_loss", simple(1.0)), "has epochs from -1 to -1"),
        (EVENTS, event(1, "merged_train_loss", tensor(1.0, form="<e", kind=19)), "there are no scalars in it"),
        (EVENTS, frame(b"") + struct.pack("<Q", 2**62) + masked(struct.pack("<Q", 2**62)), "cut off within record 2"),
        ("r.jsonl", domainbed([0, 1]).replace('"step": 1,', '"step": 1.5,'), "line 2: step is 1.5; it must be a whole"),
        ("r.jsonl", domainbed([0], loss="low"), "loss at step 0 is 'low', no number"),
        ("r.jsonl", domainbed([0], loss=None), "no line holds a number in loss"),
        ("r.jsonl", domainbed([0])[:90], "no line of it is whole"),
        ("r.jsonl", domainbed([10**10]), "it must be a whole number from 0 to 1000000000"),
        ("l.csv", "", "holds no row under a line of column names"),
        ("l.csv", "step,loss\n", "holds no row under a line of column names"),
        ("l.csv", "step,loss\n3", "no number under any of loss"),
        ("l.csv", "time,loss\n1,2\n", "no column step or epoch"),
        ("l.csv", "step;loss\n1;2\n", "separated by commas; its columns are 'step;loss'"),
        ("l.csv", "step,train\n1,2\n", "no column of loss, loss_ascent"),
        ("l.csv", "step,loss,loss\n1,2,3\n", "column 'loss' is there twice"),
        ("l.csv", "step,loss\n1,2,3\n", "line 2: has 3 cells under 2 column names"),
        ("l.csv", "step,loss\n1,high\n", "line 2: loss is 'high', no number"),
        ("l.csv", "step,loss\n2,1\n2,1\n", "line 3: step 2 follows 2; it must rise"),
        ("l.csv", "step,loss\n0.5,1\n", "line 2: step is '0.5'; it must be a whole number"),
        ("l.csv", "step,grad_norm\n1,-2\n", "grad_norm is -2; it must be at least 0"),
        ("l.csv", 'step,loss\n1,"2\n', "is not CSV as it is documented"),
        ("l.csv", b"step,loss\n1,\xff\n", "byte 12 is not UTF-8"),
        ("l.csv", "step,loss\n1,\n", "no number under any of"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(write, capsys, tmp_path, name, content, said):
    write(name, content)
    code, out, err = run(capsys, name, "--out", "o")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"disam-theory: {name}: ")
    assert said in err
    assert not (tmp_path / "o").exists()


def test_a_folder_is_refused(write, capsys, tmp_path):
    (tmp_path / "logs").mkdir()
    code, out, err = run(capsys, "logs")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "a folder; name the file in it" in err


GOOD = (
    official(),
    domainbed(STEPS).encode(),
    b"step,loss,grad_norm,lr\n" + b"".join(b"%d,2,1,.1\n" % k for k in range(70)),
)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(GOOD), st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6)), max_size=3), st.floats(0, 1))
def test_damaged_logs_are_read_in_part_or_refused_on_one_line(tmp_path, content, patches, kept):
    for where, patch in patches:
        at = int(where * len(content))
        content = content[:at] + patch + content[at + len(patch) :]
    path = tmp_path / "log"
    path.write_bytes(content[: math.ceil(kept * len(content))])
    try:
        log = read_imported(path)
        found = row(analyse(log.trace(), rows=Rows.counted(log.unit, log.at))) if log else None
    except UsageError as refusal:
        lines = str(refusal).splitlines()
    else:
        lines = ["read"] if found is None or found["steps"] == len(log.columns["loss"]) >= 1 else []
    assert len(lines) == 1


def test_events_fuzzed_below_their_checksums_are_read_in_part_or_refused(tmp_path):
    """Payloads whose bytes are changed before their checksum is made, so that the parser itself meets them."""
    rng = np.random.default_rng(0)
    payload = official()[len(VERSION) + 12 :][: struct.unpack("<Q", official()[len(VERSION) :][:8])[0]]
    ends = set()
    for _ in range(300):
        changed = bytearray(payload)
        for at in rng.integers(len(payload), size=rng.integers(1, 4)):
            changed[at] = rng.integers(256)
        path = tmp_path / EVENTS
        path.write_bytes(VERSION + event(0, "merged_train_loss", simple(1.0)) + frame(bytes(changed)))
        log = read_imported(path)
        ends.add(any("is not an event" in note for note in log.notes))
        assert len(log.at) in (1, 2)
    assert ends == {True, False}
