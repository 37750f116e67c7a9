"""Reading, grouping and aligning runs."""

from pathlib import Path

import numpy as np
import pytest
from written import curve, grid, write

from onetorch.runs import compare
from onetorch.runs.errors import RunError, UsageError


def test_runs_that_differ_only_in_seed_are_one_group_named_by_what_differs(tmp_path: Path) -> None:
    found = compare.load([str(grid(tmp_path / "sweep"))])
    assert found.varying == ["lr", "width"]
    assert [(g.name, len(g.entries)) for g in found.groups] == [(f"lr={lr} width={w}", 3) for lr in (0.1, 0.2) for w in (4, 8)]
    assert [e.seed for e in found.groups[0].entries] == [0, 1, 2]


def test_a_single_group_goes_by_the_recipes_name_and_numbers_sort_as_numbers(tmp_path: Path) -> None:
    for n in (2, 10, 9):
        write(tmp_path / f"r{n}", {"seed": 0, "hidden": [n, n]}, curve([1.0, 2.0]))
    assert [g.name for g in compare.load([str(tmp_path)]).groups] == ["hidden=[2,2]", "hidden=[9,9]", "hidden=[10,10]"]
    assert compare.load([str(tmp_path / "r2")]).groups[0].name == "made"


def test_nested_seeds_are_seeds_and_other_algorithms_are_other_groups(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"env": {"seed": 1, "name": "x"}}, curve([1.0, 2.0]))
    b = write(tmp_path / "b", {"env": {"seed": 2, "name": "x"}}, curve([1.0, 2.0]))
    assert len(compare.load([str(a), str(b)]).groups) == 1
    text = (b / "config.json").read_text(encoding="utf-8")
    (b / "config.json").write_text(text.replace("onetorch.rl.made", "onetorch.rl.other"), encoding="utf-8")
    assert [g.name for g in compare.load([str(a), str(b)]).groups] == ["made", "other"]


def test_ones_own_file_changed_is_another_algorithm(tmp_path: Path) -> None:
    for name, text in (("a", "x = 1\n"), ("b", "x = 2\n"), ("c", "x = 1\n")):
        path = write(tmp_path / name, {"seed": ord(name)}, curve([1.0, 2.0]))
        config = (path / "config.json").read_text(encoding="utf-8")
        (path / "config.json").write_text(config.replace("onetorch.rl.made", "source.py"), encoding="utf-8")
        (path / "source.py").write_text(text, encoding="utf-8")
    assert sorted(len(g.entries) for g in compare.load([str(tmp_path)]).groups) == [1, 2]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    home = grid(tmp_path / "sweep", seeds=1)
    (home / "made-0.1-4-0" / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\nrubbish\n', encoding="utf-8")
    found = compare.load([str(home)])
    assert len(found.entries) == 3
    assert "metrics.jsonl:2 is damaged" in found.notes[0]
    with pytest.raises(RunError, match=r"metrics\.jsonl:2 is damaged"):
        compare.load([str(home / "made-0.1-4-0")])
    for words, message in ((["nowhere"], "no folder nowhere"), ([], "expected one run or more")):
        with pytest.raises(UsageError, match=message):
            compare.load(words)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no run"):
        compare.load([str(tmp_path / "empty")])


def test_rows_of_several_kinds_a_cut_last_line_and_numbers_that_are_none(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 3.0}, {"step": 1, "val": 5}, {"step": 2, "loss": 2.0, "note": "text", "flag": True}, {"step": 3, "loss": float("inf")}]
    path = write(tmp_path / "r", {"seed": 0}, rows)
    with open(path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    columns = compare.read(path).columns
    assert set(columns) == {"loss", "val"}
    assert columns["loss"].steps.tolist() == [1, 2]
    assert columns["loss"].values.tolist() == [3.0, 2.0]
    assert columns["val"].seconds.tolist() == [0.01]


def test_the_outcome_is_the_evaluations_else_the_end_of_the_curve_and_none_for_half_a_run(tmp_path: Path) -> None:
    rows = curve([float(i) for i in range(40)])
    one = compare.read(write(tmp_path / "a", {"seed": 0}, rows, {"loss": 7.5}))
    two = compare.read(write(tmp_path / "b", {"seed": 0}, rows))
    half = compare.read(write(tmp_path / "c", {"seed": 0}, rows, status="failed"))
    assert one.outcome("loss") == 7.5
    assert two.outcome("loss") == 37.5  # 36, 37, 38, 39: the last tenth of 40
    assert half.outcome("loss") is None
    assert one.outcome("other") is None


def test_a_grid_interpolates_within_and_ends_with_the_shortest(tmp_path: Path) -> None:
    a = compare.Column(np.array([0.0, 10.0]), np.array([0.0, 1.0]), np.array([0.0, 10.0]))
    b = compare.Column(np.array([2.0, 6.0]), np.array([0.0, 1.0]), np.array([1.0, 5.0]))
    x, curves = compare.on_grid([a, b], "steps", 5)
    assert x.tolist() == [2, 3, 4, 5, 6]
    assert curves.tolist() == [[2, 3, 4, 5, 6], [1, 2, 3, 4, 5]]
    late = compare.Column(np.array([20.0, 30.0]), np.array([0.0, 1.0]), np.array([1.0, 5.0]))
    assert compare.on_grid([a, late], "steps", 5) is None
    same = compare.on_grid([a, compare.Column(a.steps, a.seconds, a.values + 1)], "steps", 5)
    assert same[0].tolist() == [0, 10]


def test_thinning_keeps_ends_and_every_spike() -> None:
    values = np.zeros(10_000)
    values[[1234, 7777]] = 5.0, -3.0
    column = compare.Column(np.arange(10_000.0), np.arange(10_000.0), values)
    thinned = compare.thin(column, 100)
    assert len(thinned.values) <= 100
    assert (thinned.values.max(), thinned.values.min()) == (5.0, -3.0)
    assert thinned.steps[[0, -1]].tolist() == [0, 9999]
    assert (np.diff(thinned.steps) > 0).all()
    assert compare.thin(column, 10_000) is column


def test_effects_are_those_that_made_the_results(tmp_path: Path) -> None:
    found, untold = compare.effects(compare.load([str(grid(tmp_path / "sweep"))]), "loss")
    assert untold == []
    assert [(e.name, e.before, e.after, e.blocks) for e in found] == [("width", 4, 8, 2), ("lr", 0.1, 0.2, 2)]
    assert [e.change.value for e in found] == pytest.approx([4.0, 1.0])
    assert all(e.matters for e in found)


def test_fields_that_only_change_together_cannot_be_told_apart(tmp_path: Path) -> None:
    for i, (lr, width) in enumerate(((0.1, 4), (0.2, 8))):
        for seed in range(3):
            write(tmp_path / f"r{i}{seed}", {"seed": seed, "lr": lr, "width": width}, curve([1.0, 2.0]), {"loss": float(i)})
    assert compare.effects(compare.load([str(tmp_path)]), "loss") == ([], ["lr", "width"])


def test_many_values_make_a_rank_correlation(tmp_path: Path) -> None:
    for i in range(12):
        write(tmp_path / f"r{i}", {"seed": 0, "lr": 10.0**-i, "width": 2**i}, curve([1.0, 2.0]), {"loss": float(i)})
    found, untold = compare.effects(compare.load([str(tmp_path)]), "loss")
    assert untold == []
    assert {e.name: e.change.value for e in found} == {"lr": -1.0, "width": 1.0}


def test_the_quantity_to_compare_by(tmp_path: Path) -> None:
    entry = compare.read(write(tmp_path / "r", {"seed": 0}, curve([1.0, 2.0]), {"video": "x.mp4", "return": 3.0}))
    assert compare.main_result([entry]) == "return"
    assert compare.main_result([entry], "loss") == "loss"
    with pytest.raises(UsageError, match="did you mean 'return'"):
        compare.main_result([entry], "retrun")
