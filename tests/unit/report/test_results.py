"""Result files in InferenceX's shape become curves; wrong ones are refused by name."""

import json

import pytest

from dsv4_plugin.report.curves import ResultError, load_results


def test_a_directory_becomes_one_curve_by_configuration(tmp_path, result, write):
    for conc in (4, 8, 16):
        write(tmp_path / f"c{conc}.json", result(conc))
    write(tmp_path / "mtp.json", result(8, spec_decoding="mtp"))
    write(tmp_path / "environment.json", {"python": "3.11"})
    curves, passed_over = load_results([tmp_path])
    assert sorted((curve.label, len(curve.points)) for curve in curves) == [
        ("2026-09-01 mi355x sglang fp4", 3),
        ("2026-09-01 mi355x sglang fp4 mtp", 1),
    ]
    assert passed_over == [tmp_path / "environment.json"]
    assert all(
        (curve.hardware, curve.gpus, curve.workload) == ("MI355X", 8, "8192/1024")
        for curve in curves
    )


def test_a_list_and_json_lines_are_read(tmp_path, result, write):
    one = write(tmp_path / "sweep.json", [result(4), result(8)])
    lines = tmp_path / "more.jsonl"
    lines.write_text(json.dumps(result(16)) + "\n" + json.dumps(result(32)) + "\n")
    (curve,), _ = load_results([one, lines])
    assert [point.concurrency for point in curve.points] == [4, 8, 16, 32]


def test_layouts_of_one_configuration_share_a_curve(tmp_path, result, write):
    path = write(
        tmp_path / "a.json",
        [result(8), result(64, dp_attention="true"), result(128, dp_attention=True, ep=8)],
    )
    (curve,), _ = load_results([path])
    assert {point.layout for point in curve.points} == {"tp8", "dp8", "dp8-ep8"}


def test_measured_input_and_output_are_kept(tmp_path, result, write):
    (curve,), _ = load_results(
        [write(tmp_path / "a.json", result(8, output_tput_per_gpu=40.0, input_tput_per_gpu=368.0))]
    )
    assert (curve.points[0].input_tput_per_gpu, curve.points[0].output_tput_per_gpu) == (
        368.0,
        40.0,
    )


def test_interactivity_falls_back_on_the_time_per_token(tmp_path, result, write):
    made = result(8)
    del made["median_intvty"]
    (curve,), _ = load_results([write(tmp_path / "a.json", made)])
    assert curve.points[0].intvty == pytest.approx(1 / 0.08)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"isl": None, "median_intvty": None, "median_tpot": None}, "isl, median_intvty missing"),
        ({"tput_per_gpu": "fast"}, "tput_per_gpu missing or not a number"),
        ({"tput_per_gpu": 0.0}, "tput_per_gpu is 0"),
        ({"median_intvty": 0.0}, "median_intvty is 0"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, result, write, changes, message):
    with pytest.raises(ResultError, match=message):
        load_results([write(tmp_path / "a.json", result(8, **changes))])


def test_absent_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ResultError, match="nowhere does not exist"):
        load_results([tmp_path / "nowhere"])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ResultError, match="bad.json is not valid JSON"):
        load_results([tmp_path / "bad.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResultError, match="no result found"):
        load_results([tmp_path / "empty"])


def test_rates_of_different_gpus_are_not_taken_for_rates_of_one(result, write, tmp_path):
    """A disaggregated row: 8 of 24 GPUs write 1,000 tokens/s each, 16 read 4,000 each; over all
    24 that is 3,000 in total, of which the workload reads 8 of 9."""
    row = result(isl=8192, osl=1024, tput_per_gpu=3000.0) | {
        "input_tput_per_gpu": 4000.0,
        "output_tput_per_gpu": 1000.0,
    }
    write(tmp_path / "row.json", row)
    [curve], _ = load_results([tmp_path])
    [point] = curve.points
    assert point.input_tput_per_gpu == pytest.approx(3000 * 8 / 9)
    assert point.output_tput_per_gpu == pytest.approx(3000 / 9)
