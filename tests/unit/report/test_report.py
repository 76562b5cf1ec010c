"""`dsv4 report` end to end: its files, their figures, and what it refuses."""

import csv
import json
import re
from pathlib import Path

import pytest

import dsv4_plugin
from dsv4_plugin.cli import main
from dsv4_plugin.report.cost import SHIPPED
from dsv4_plugin.roofline.hardware import SHIPPED as HARDWARE


def read_csv(path):
    with path.open(newline="") as opened:
        return list(csv.reader(opened))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report") / "out"
    assert main(["report", "--published", "--out", str(directory)]) == 0
    return directory


def test_published_files(published):
    assert {path.name for path in published.iterdir()} == {
        "iso_interactivity.csv",
        "pareto.png",
        "pareto.svg",
        "cost.csv",
        "report.md",
        "report.html",
    }
    assert (published / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_iso_interactivity_table(published):
    head, *rows = read_csv(published / "iso_interactivity.csv")
    assert head == [
        "tok_s_user",
        "2026-04-25",
        "2026-05-02",
        "2026-05-04",
        "2026-05-10",
        "2026-05-21",
    ]
    cells = {row[0]: row[1:] for row in rows}
    assert list(cells) == ["8", "10", "12", "15", "17", "20", "25", "30", "40", "50"]
    assert cells["8"][0] == "" and cells["8"][4] == ""
    # The article's cell, within the rounding of its integers.
    assert float(cells["10"][4]) == pytest.approx(2162, abs=0.5)


def test_costs(published):
    head, *rows = read_csv(published / "cost.csv")
    column = head.index
    peak = next(
        row
        for row in rows
        if row[column("tok_s_gpu")] == "2256.1" and row[column("owner")] == "owner"
    )
    # 1.50 · 10⁶ / (3600 · 2256.1) in all; one token of nine is written.
    assert float(peak[column("dollars_per_million_total")]) == pytest.approx(0.18469, abs=1e-4)
    assert float(peak[column("dollars_per_million_output")]) == pytest.approx(9 * 0.18469, abs=1e-3)


def test_markdown_and_page_say_the_headlines(published):
    for name in ("report.md", "report.html"):
        text = (published / name).read_text()
        for words in ("110.5x", "$0.291/M at 1,411", "2026-05-10", "did not print"):
            assert words in text, f"{name} lacks {words}"


def test_the_page_needs_nothing_beside_it(published):
    text = (published / "report.html").read_text()
    assert "<svg" in text
    # xmlns and metadata names are no fetches.
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\(\s*['\"]?http", text)


def test_own_results_are_drawn_beside_the_published_curves(tmp_path, result, write):
    path = write(tmp_path / "own.json", [result(4, label="ours"), result(8, label="ours")])
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 0
    head = read_csv(tmp_path / "out" / "iso_interactivity.csv")[0]
    assert head[-1] == "ours" and head[1] == "2026-04-25"
    assert "ours (own measurement)" in (tmp_path / "out" / "pareto.svg").read_text()


def test_another_workload_stands_alone(tmp_path, capsys, result, write):
    path = write(
        tmp_path / "tiny.json",
        [result(c, isl=64, osl=16, hw="cpu", label="tiny") for c in (1, 2, 4)],
    )
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "not drawn together" in capsys.readouterr().err
    head, *rows = read_csv(tmp_path / "out" / "iso_interactivity.csv")
    assert head == ["tok_s_user", "tiny"] and rows
    assert "No price for CPU" in (tmp_path / "out" / "report.md").read_text()


def test_limit_and_what_holds_points_back(tmp_path):
    assert main(["report", "--published", "--roofline", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "Distance to the limit of MI355X" in text
    row = next(line for line in text.splitlines() if line.startswith("| 2026-05-21 | dp8 | 256 |"))
    fractions = [float(cell.strip(" %")) for cell in row.split("|")[6:8]]
    assert all(0 < fraction < 100 for fraction in fractions)


def test_an_edited_cost_table_is_used(tmp_path):
    table = tmp_path / "costs.yaml"
    table.write_text("owners: {us: ourselves}\ndollars_per_gpu_hour: {MI355X: {us: 3.6}}\n")
    assert (
        main(["report", "--published", "--costs", str(table), "--out", str(tmp_path / "out")]) == 0
    )
    head, *rows = read_csv(tmp_path / "out" / "cost.csv")
    peak = next(row for row in rows if row[head.index("tok_s_gpu")] == "500.2")
    # 3.6 $/h is 1/1000 $ a second.
    assert float(peak[head.index("dollars_per_million_total")]) == pytest.approx(
        1000 / 500.2, abs=1e-4
    )


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "owners: {us: x}\ndollars_per_gpu_hour: {MI355X: {them: 1}}",
            "'them', which is not in 'owners'",
        ),
        (
            "owners: {us: x}\ndollars_per_gpu_hour: {MI355X: {us: free}}",
            "'free'; give dollars per GPU hour",
        ),
        ("[]", "needs the keys"),
        ("a: [", "cost table"),
    ],
)
def test_a_wrong_cost_table_is_named(tmp_path, capsys, text, message):
    table = tmp_path / "costs.yaml"
    table.write_text(text)
    assert (
        main(["report", "--published", "--costs", str(table), "--out", str(tmp_path / "out")]) == 2
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [([], "give result files"), (["--published", "--no-published"], "exclude each other")],
)
def test_wrong_arguments(arguments, message, capsys, tmp_path):
    assert main(["report", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_workloads_do_not_mix(tmp_path, capsys, result, write):
    path = write(tmp_path / "a.json", [result(8), result(8, isl=1024)])
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "cannot share a figure" in capsys.readouterr().err


def test_concurrency_labels_do_not_touch():
    """No two texts of the figure touch, and nearly every point has one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from dsv4_plugin.report.curves import load_published
    from dsv4_plugin.report.plot import draw

    figure = draw(load_published().curves)
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) >= 32  # of 35 points
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_shipped_cost_table_prices_every_gpu_of_the_roofline():
    import yaml

    hardware = yaml.safe_load(HARDWARE.read_text())
    assert hardware.keys() <= yaml.safe_load(SHIPPED.read_text())["dollars_per_gpu_hour"].keys()


def test_roofline_json(capsys):
    assert (
        main(["roofline", "--json", "--fit", "--batch", "1,32", "--what-if", "bandwidth=0.5"]) == 0
    )
    figures = json.loads(capsys.readouterr().out)
    assert figures["checkpoint_bytes"] == 864_704_792_696
    # Half the bandwidth: 1.01 ms at batch 1 becomes two of weights alone.
    assert figures["steps"][0]["seconds_by_kind"]["weights"] == pytest.approx(2.02e-3, rel=0.01)
    assert [fit["date"] for fit in figures["fits"]][-1] == "2026-05-21"


def test_roofline_table(capsys):
    assert (
        main(["roofline", "--model", "flash", "--layout", "dp8", "--prefill", "--batch", "8"]) == 0
    )
    shown = capsys.readouterr().out
    assert (
        "Lower bound of one prefill step" in shown
        and "routed_experts" in shown
        and "Best possible curve" in shown
    )


def test_roofline_refuses_a_fit_of_another_gpu(capsys):
    assert main(["roofline", "--gpu", "H200", "--fit"]) == 2
    assert "the published curves are of pro on MI355X" in capsys.readouterr().err


def test_data_files_have_the_suffixes_that_are_packaged():
    """And the headers of TileLang's kernels, whose directory is named there."""
    package = Path(dsv4_plugin.__file__).parent
    headers = package / "kernels" / "tilelang" / "headers"
    names = {
        path.suffix
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and headers not in path.parents
    }
    assert names <= {".yaml", ".json"}  # the suffixes that pyproject.toml lists


def test_a_report_of_a_cpu_says_whose_it_is_and_nothing_of_gpus(result, write, tmp_path):
    from dsv4_plugin.report.curves import load_results
    from dsv4_plugin.report.plot import draw

    for conc in (1, 64):
        write(tmp_path / f"c{conc}.json", result(conc, hw="cpu", tput_per_gpu=10.0 * conc))
    assert main(["report", str(tmp_path), "--no-published", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "from the result files given." in text.split("|")[0] and "peak tokens/s |" in text
    # a factor of 64 between the points, and still an axis from 0
    [axes] = draw(load_results([tmp_path / "c1.json", tmp_path / "c64.json"])[0]).axes
    assert axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0 == axes.get_xlim()[0]
    assert axes.get_ylabel().endswith("(tokens/s)")


def test_published_curves_say_that_others_measured_them(published):
    first_screen = (published / "report.md").read_text().split("|")[0]
    assert (
        "published by others" in first_screen and "not measured with this package" in first_screen
    )


def test_goodput_stands_in_the_report_and_its_levels_in_the_figure(result, write, tmp_path):
    counted = {"server": 1.25, "interactive": 0.5}
    path = write(tmp_path / "own.json", [result(1, goodput=counted), result(8)])
    assert main(["report", str(path), "--no-published", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "server 2 s and 80 ms; interactive 1.5 s and 15 ms" in text
    [row] = [line for line in text.splitlines() if "1.25" in line and "0.50" in line]
    assert "| 1 |" in row
    drawn = (tmp_path / "out" / "pareto.svg").read_text()
    assert "server: TPOT 80 ms" in drawn and "interactive: TPOT 15 ms" in drawn


def test_curves_that_nobody_judged_have_no_goodput(published):
    assert "Goodput" not in (published / "report.md").read_text()
    # the fastest published user has 57 tokens/s, less than interactive's 67: its line is not drawn
    drawn = (published / "pareto.svg").read_text()
    assert "server: TPOT 80 ms" in drawn and "interactive: TPOT" not in drawn
