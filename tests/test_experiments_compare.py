"""Comparison of runs: what is found, grouped, averaged, written, and refused."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from experiments import command_line, compare, compare_figures, compare_tables
from experiments.adversarial_training import PRESETS
from experiments.compare_runs import find, grouped
from experiments.training_settings import NOT_OF_THE_RUN
from robustjax import metrics
from robustjax.training import report

STEPS_PER_EPOCH = 10


def parse(*words):
    return command_line.parse_settings(words, compare.Settings, {"default": compare.Settings()})[0]


def write_run(folder, *, seed=0, best=None, last=None, epochs=3, done=None, **changes):
    """The folder of a run: validated at each of the ``done`` epochs, pgd20 best after the first."""
    settings = dataclasses.replace(
        PRESETS["small"], seed=seed, epochs=epochs, eps_warmup=0, checkpoint_every=1,
        **{"objective": ("madry",), **changes},
    )  # fmt: skip
    config = dataclasses.asdict(settings)
    for name in NOT_OF_THE_RUN:
        del config[name]
    folder.mkdir(parents=True)
    report.write_json(folder / report.CONFIG, config)
    lines = []
    for epoch in range(1, 1 + (epochs if done is None else done)):
        step = epoch * STEPS_PER_EPOCH
        lines.append({"step": step, "split": "train", "loss": 2.0 / epoch + seed})
        pgd = 0.5 - 0.1 * (epoch - 1)
        lines.append({"step": step, "split": "validation", "clean": 0.9, "pgd20": pgd})
    (folder / report.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if best is not None:
        last = best if last is None else last
        results = {
            "test_examples": 500,
            "best": {"step": STEPS_PER_EPOCH, "clean": best[0], "pgd20": best[1]},
            "last": {"step": epochs * STEPS_PER_EPOCH, "clean": last[0], "pgd20": last[1]},
        }
        report.write_json(folder / "results.json", results)
    return folder


def write_evaluation(folder, checkpoint, accuracy, **changes):
    folder.mkdir(parents=True)
    config = {"checkpoint": str(checkpoint), "which": "best", "attack": ["autoattack"],
              "version": "standard", "threat": "linf", "eps": 0.2, "split": "test"}  # fmt: skip
    report.write_json(folder / report.CONFIG, {**config, **changes})
    report.write_json(folder / "results.json", {"robust_accuracy": accuracy, "examples": 500})


@pytest.fixture
def runs(tmp_path):
    """Three seeds of madry, one of them with AutoAttack, and two of trades, one half done."""
    folder = tmp_path / "runs"
    for seed, pgd in enumerate((0.5, 0.52, 0.57)):
        write_run(folder / f"m{seed}" / "madry", seed=seed, best=(0.8, pgd), last=(0.9, 0.4))
    write_evaluation(folder / "m1" / "autoattack", "elsewhere/m1/madry", 0.41)
    trades = {"objective": ("trades",)}
    write_run(folder / "t0" / "trades", best=(0.7, 0.5), last=(0.7, 0.6), **trades)
    write_run(folder / "t1" / "trades", seed=1, done=2, **trades)
    return folder


def main(runs, *words):
    return compare.main(parse(str(runs), f"--output={runs.parent / 'out'}", *words))


def test_words_that_are_no_flags_are_the_folders():
    settings = parse("a", "--which=best", "b", "--measures=clean,pgd20", "--verbosity=-1")
    assert settings == compare.Settings(
        dir=("a", "b"), which=("best",), measures=("clean", "pgd20")
    )
    assert parse() == compare.Settings()
    with pytest.raises(ValueError, match="unknown flag --whch, did you mean --which"):
        parse("a", "--whch=best")
    with pytest.raises(ValueError, match="best"):
        parse("a", "--which=first")
    text = command_line.help_text(compare.Settings, {"default": compare.Settings()}, "")
    assert "  DIR...: folders; the runs in and below them are compared []" in text.splitlines()
    assert "--dir" not in text


def test_means_and_intervals_over_seeds(runs):
    madry, trades = main(runs)["groups"]
    assert madry["settings"] == {"objective": ("madry",)}
    assert [run["seed"] for run in madry["runs"]] == [0, 1, 2]
    found = madry["best"]["test"]["pgd20"]
    expected = metrics.bootstrap_mean([0.5, 0.52, 0.57])
    assert found["mean"] == pytest.approx(0.53)
    assert found["std"] == pytest.approx(np.sqrt(0.0013))
    # Of 27 samples of three, the least mean and the greatest have probability 1/27 > 2.5 %.
    assert (found["low"], found["high"]) == pytest.approx((0.5, 0.57))
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert madry["last"]["test"]["clean"]["mean"] == pytest.approx(0.9)
    assert madry["last"]["validation"]["pgd20"]["mean"] == pytest.approx(0.3)
    fallen = 100 * (np.array([0.5, 0.52, 0.57]) - 0.4) / [0.5, 0.52, 0.57]
    np.testing.assert_allclose(madry["overfitting"]["test"]["pgd20"]["values"], fallen)
    assert "clean" not in madry["overfitting"]["test"]
    assert madry["best"]["test"]["autoattack linf 0.2"]["values"] == [0.41]
    # The last is better than the best on the validation set: no overfitting.
    assert trades["overfitting"]["test"]["pgd20"]["values"] == [0]


def test_panels_have_units_and_lines_by_group_and_split(runs, monkeypatch):
    drawn = {}
    monkeypatch.setattr(compare_figures, "curves", lambda path, panels: drawn.update(panels))
    main(runs)
    assert list(drawn) == ["loss (nats)", "accuracy, clean (%)", "accuracy, pgd20 (%)"]
    madry, trades = ("1: objective=madry (3 seeds)", "2: objective=trades (2 seeds)")
    assert list(drawn["loss (nats)"]) == [(madry, "train"), (trades, "train")]
    robust = drawn["accuracy, pgd20 (%)"][trades, "validation"]
    np.testing.assert_allclose(robust.mean, [50, 40, 30])
    loss = drawn["loss (nats)"][madry, "train"]
    np.testing.assert_allclose(loss.mean, [3, 2, 5 / 3])
    np.testing.assert_allclose(loss.high - loss.low, 2)


def test_an_unfinished_run_does_not_count_beside_a_finished_one(runs):
    _, trades = main(runs)["groups"]
    assert [(r["finished"], r["step"], r["steps"]) for r in trades["runs"]] == [
        (True, 30, 30),
        (False, 20, 30),
    ]
    assert trades["last"]["validation"]["pgd20"]["values"] == pytest.approx([0.3])


def test_unfinished_runs_alone_count_as_far_as_they_are(tmp_path):
    write_run(tmp_path / "runs" / "a", done=2)
    write_run(tmp_path / "runs" / "b", seed=1, done=0)
    (group,) = main(tmp_path / "runs")["groups"]
    assert group["settings"] == {"objective": ("madry",)}
    assert [run["steps"] for run in group["runs"]] == [30, 30]
    assert group["best"]["validation"]["pgd20"]["values"] == pytest.approx([0.5])
    assert group["last"]["validation"]["pgd20"]["values"] == pytest.approx([0.4])
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| 1 | madry | 2 | 0; step 0 to 20 of 30 | best | 90 (1 of 2) | 50 (1 of 2) |" in table


def test_printed_table_and_files(runs, capsys):
    main(runs)
    printed = capsys.readouterr().out
    assert "the same in all runs: dataset=mnist5k, model=small_cnn, norm=linf, eps=0.2" in printed
    assert "53 ± 3.6 [50, 57]" in printed
    assert "…" not in printed
    out = runs.parent / "out"
    table = (out / "table.md").read_text()
    assert (
        "| 1 | madry | 3 | all | best | 80 ± 0 [80, 80] | 53 ± 3.6 [50, 57] | 41 (1 of 3) |"
        in table
    )
    assert "| 2 | trades | 2 | 1; step 20 of 30 | last | 70 (1 of 2) | 60 (1 of 2) |" in table
    with (out / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["checkpoint"] for row in rows] == 2 * ["best", "last", "overfitting"]
    assert float(rows[0]["test pgd20 (%)"]) == pytest.approx(53)
    assert float(rows[0]["test pgd20 (%) high"]) == pytest.approx(57)
    assert (rows[3]["finished"], rows[3]["least step"], rows[3]["steps"]) == ("1", "20", "30")
    assert (out / "curves.png").stat().st_size > 10_000
    saved = json.loads((out / "results.json").read_text())
    assert saved["groups"][0]["best"]["test"]["pgd20"]["mean"] == pytest.approx(0.53)
    main(runs, "--split=test")  # again, into the same folder
    assert not (out / "curves.png").exists()


def test_flags_choose_checkpoints_splits_measures_and_groups(runs, capsys):
    (group,) = main(runs, "--which=last", "--split=test", "--measures=pgd20", "--group_by=eps")[
        "groups"
    ]
    assert group["settings"] == {"eps": 0.2}
    assert set(group) == {"settings", "runs", "last"}
    assert group["last"] == {"test": {"pgd20": group["last"]["test"]["pgd20"]}}
    assert group["last"]["test"]["pgd20"]["values"] == pytest.approx([0.4, 0.6, 0.4, 0.4])
    assert "warning: the runs of eps=0.2 differ in objective too" in capsys.readouterr().out
    with pytest.raises(ValueError, match="measures must be of clean, pgd20 in validation, got 'x'"):
        main(runs, "--split=validation", "--measures=x")
    with pytest.raises(ValueError, match=r"group_by must be one of 'dataset', .*got 'epsilon'"):
        main(runs, "--group_by=epsilon")


def test_groups_are_named_by_what_differs_and_sorted(tmp_path):
    for name, eps, width in (("a", 8 / 255, 16), ("b", 2 / 255, None), ("c", 2 / 255, 16)):
        write_run(tmp_path / name, eps=eps, width=width, done=1)
    write_run(tmp_path / "d", eps=8 / 255, width=16, seed=1, done=1)
    found, skipped = find([str(tmp_path), str(tmp_path / "a")])
    assert len(found) == 4 and not skipped
    assert [group.label for group in grouped(found)] == [
        "width=None, eps=2/255",
        "width=16, eps=2/255",
        "width=16, eps=8/255",
    ]
    assert [run.settings.seed for run in grouped(found)[-1].runs] == [0, 1]


def test_damaged_and_foreign_folders_are_named_and_left_out(tmp_path, capsys):
    runs = tmp_path / "runs"
    good = write_run(runs / "good", best=(0.9, 0.5))
    write_run(runs / "copy", done=1)
    (write_run(runs / "config", seed=1) / report.CONFIG).write_text("{")
    (write_run(runs / "foreign", seed=1) / report.CONFIG).write_text('{"layers": 3}')
    (write_run(runs / "none", seed=1) / report.CONFIG).unlink()
    (write_run(runs / "lines", seed=1) / report.METRICS).write_text('{"step"\n{"step": 1}\n')
    (write_run(runs / "words", seed=1) / report.METRICS).write_text(
        '{"step": 1, "split": "train", "loss": "low"}\n'
    )
    (write_run(runs / "half", seed=1) / "results.json").write_text('{"best": {"step": 1}}')
    (write_run(runs / "type", seed=1) / "results.json").write_text('{"best": 1, "last": 1}')
    write_evaluation(runs / "stray", "runs/absent", 0.3)
    results = main(runs)
    assert {folder.removeprefix(f"{runs}/") for folder in results["skipped"]} == {
        "copy", "config", "foreign", "none", "lines", "words", "half", "type", "stray",
    }  # fmt: skip
    printed = " ".join(capsys.readouterr().out.split())
    assert f"warning: {runs / 'copy'} is left out: the same settings and seed as {good}" in printed
    assert f"{runs / 'lines'} is left out: {runs / 'lines' / report.METRICS} line 1" in printed
    ((run,),) = (group["runs"] for group in results["groups"])
    assert run["folder"] == good


def test_nothing_to_compare_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="DIR must be at least one folder with runs, got none"):
        compare.main(compare.Settings())
    with pytest.raises(ValueError, match=r"DIR must be a folder with runs, got .*absent"):
        main(tmp_path / "absent")
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="got none in"):
        main(tmp_path / "runs")
    write_run(tmp_path / "runs" / "a")
    with pytest.raises(ValueError, match="holds a run with"):  # not over the files of a run
        compare.main(parse(str(tmp_path / "runs"), f"--output={tmp_path / 'runs' / 'a'}"))


def test_values_that_are_not_finite(tmp_path):
    folder = write_run(tmp_path / "runs" / "a", done=2)
    record = {"step": 20, "split": "gradients", "correlation": "nan"}
    with (folder / report.METRICS).open("a") as file:
        file.write(json.dumps(record) + "\n")
    main(tmp_path / "runs", "--split=gradients", "--which=last")
    assert "| last | not finite |" in (tmp_path / "out" / "table.md").read_text()


def test_mean_curve_is_of_the_runs_that_have_reached_a_step():
    curve = compare_figures.mean_curve([{1: 1.0, 2: 2.0, 4: 5.0}, {1: 3.0, 2: 6.0}, {}])
    assert curve.step.tolist() == [1, 2, 4]
    assert curve.mean.tolist() == [2, 4, 5]
    assert curve.low.tolist() == [1, 2, 5]
    assert curve.high.tolist() == [3, 6, 5]
    assert len(compare_figures.mean_curve([{}]).step) == 0
    assert compare_figures.mean_curve([{3: 0.25}], scale=100).mean.tolist() == [25]


def test_a_table_that_is_too_wide_is_printed_in_parts(capsys, monkeypatch):
    columns = ["group", "objective", "eps", "seeds", "checkpoint", "test clean (%)", "test pgd (%)"]
    rows = [["1", "madry", "8/255", "3", which, *2 * ["53 ± 3.6 [50, 57]"]] for which in "ab"]

    def lines(width):
        monkeypatch.setattr(compare_tables, "_available", lambda: width)
        compare_tables.print_groups("Runs", columns, rows, of_group=4)
        return capsys.readouterr().out.splitlines()

    def cells(found):
        return [line.replace("│", " ").split() for line in found if line.startswith("│")]

    assert cells(lines(160))[1] == ["b", *2 * ["53", "±", "3.6", "[50,", "57]"]]
    assert cells(lines(80))[1] == 2 * ["[50,", "57]"]
    parts = lines(50)
    assert parts[0].strip() == "Groups"
    assert cells(parts)[0] == ["1", "madry", "8/255", "3"]
    assert cells(parts)[1:3] == [["1", "a", *2 * ["53", "±", "3.6"]], 2 * ["[50,", "57]"]]
    narrow = "".join(lines(30))
    assert narrow.count("Runs") == 2 and "…" not in narrow
