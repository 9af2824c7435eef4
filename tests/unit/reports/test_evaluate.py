"""The evaluation: its arithmetic, its split, and the promise of the README on real reports where they are."""

from pathlib import Path

import pytest

from medim_ray.reports.evaluate import evaluate, indexed_by_humans, main, score, split_halves

OPENI = Path(__file__).parents[3] / "../shared/data/openi/reports.csv"


def test_score_counts_only_headings_that_a_truth_holds() -> None:
    result = score([{"A", "B"}, set()], [{"A", "Z"}, {"B"}])
    assert (result.true_positives, result.false_positives, result.false_negatives) == (1, 1, 1)
    assert (result.precision, result.recall, result.f1) == (0.5, 0.5, 0.5)
    assert result.per_heading == {"A": (1, 0, 0), "B": (0, 1, 1)}


def test_main_headings_of_a_mesh_column() -> None:
    assert indexed_by_humans("Opacity/lung/base;Aorta, Thoracic/tortuous;Opacity/lung") == {
        "Opacity",
        "Aorta, Thoracic",
    }
    assert indexed_by_humans("normal") == indexed_by_humans("No Indexing") == indexed_by_humans("") == set()


def test_halves_are_disjoint_and_do_not_depend_on_order() -> None:
    ids = [str(number) for number in range(101)]
    dev, held_out = split_halves(ids)
    assert (len(dev), len(held_out), dev & held_out) == (50, 51, set())
    assert split_halves(ids[::-1]) == (dev, held_out)


def test_command_prints_scores_and_headings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "reports.csv"
    path.write_text(
        "uid,MeSH,findings,impression\n1,Cardiomegaly/mild,Mild cardiomegaly.,\n2,normal,No effusion.,Normal.\n"
    )
    main([str(path), "--half", "all"])
    printed = capsys.readouterr().out
    assert "2 reports (all), 1 headings" in printed
    assert "tagger             F1 1.000" in printed
    with pytest.raises(ValueError, match="half='test'"):
        evaluate(str(path), "test")


def test_headings_agree_with_human_indexers_on_the_reports_that_rules_were_written_on() -> None:
    if not OPENI.exists():
        pytest.skip("the Open-i reports are not beside the project (../shared/data/openi)")
    result, baseline, _ = evaluate(str(OPENI), "dev")
    assert result.f1 >= 0.90
    assert baseline.f1 < 0.25
