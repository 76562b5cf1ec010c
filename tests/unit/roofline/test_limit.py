"""The best possible curve, and the fit that says what holds a measured one back."""

import dataclasses

import pytest

from dsv4_plugin.checkpoint.released import load_geometry
from dsv4_plugin.report.curves import Curve, Point, load_published
from dsv4_plugin.report.plot import Limit
from dsv4_plugin.roofline.fit import fit_curve
from dsv4_plugin.roofline.hardware import Hardware
from dsv4_plugin.roofline.layout import Layout, LayoutError
from dsv4_plugin.roofline.limit import Workload, limit_frontier, limit_point, limit_points
from dsv4_plugin.roofline.step import Efficiency

MI355X, PRO = Hardware.named("MI355X"), load_geometry("pro")
WORKLOAD = Workload.nominal(8192, 1024)
ARMS = [Layout(8), Layout(8, dp=8)]


def test_mean_lengths():
    assert (WORKLOAD.isl, WORKLOAD.osl) == pytest.approx((7372.8, 921.6))


def test_one_user_waits_for_nobody():
    point = limit_point(PRO, MI355X, Layout(8), 1, WORKLOAD)
    assert point.tpot == pytest.approx(point.decode.seconds, rel=1e-12)
    assert point.tput_per_gpu == pytest.approx(
        (WORKLOAD.isl + WORKLOAD.osl) / (point.prefill_seconds + WORKLOAD.osl * point.tpot) / 8
    )


def test_tokens_are_conserved():
    """Little's law: users = request rate times the cycle."""
    for point in limit_points(PRO, MI355X, ARMS, WORKLOAD):
        rate = point.tput_per_gpu * point.layout.gpus / (WORKLOAD.isl + WORKLOAD.osl)
        assert rate * point.cycle == pytest.approx(point.concurrency, rel=1e-12)


def test_no_published_point_beats_the_limit():
    limit = Limit("", limit_frontier(limit_points(PRO, MI355X, ARMS, WORKLOAD)))
    for curve in load_published().curves:
        for point in curve.points:
            assert 0 < limit.fraction(point.intvty, point.tput_per_gpu) < 1


def test_beyond_the_limit_there_is_no_fraction():
    limit = Limit("", limit_frontier(limit_points(PRO, MI355X, ARMS, WORKLOAD)))
    assert limit.fraction(1.01 * limit.frontier.intvty[-1], 1) is None
    assert limit.fraction(0.1, 100) == pytest.approx(100 / limit.frontier.tput[0])


def test_a_model_that_does_not_fit_has_no_curve():
    with pytest.raises(LayoutError, match="weights alone fill the memory"):
        limit_frontier(limit_points(PRO, Hardware.named("H200"), [Layout(4)], WORKLOAD))


def made_curve(launch, decode, prefill, noise=()):
    """A curve that reaches exactly these efficiencies."""
    efficiency = Efficiency(
        bandwidth=decode, compute=decode, link=decode, launch=launch, prefill=prefill / decode
    )
    points = []
    for index, (layout, conc) in enumerate(
        [("tp8", 1), ("tp8", 4), ("tp8", 16), ("dp8", 64), ("dp8", 256)]
    ):
        made = limit_point(PRO, MI355X, Layout.parse(layout), conc, WORKLOAD, efficiency)
        factor = noise[index] if noise else 1.0
        points.append(
            Point(conc, made.tput_per_gpu * factor, made.intvty * factor, 0, 0, layout=layout)
        )
    return Curve("made", tuple(points), "MI355X", 8, 8192, 1024)


@pytest.mark.parametrize(
    "launch, decode, prefill", [(10e-6, 0.4, 0.3), (2e-6, 0.9, 0.5), (50e-6, 0.05, 0.05)]
)
def test_the_fit_finds_what_made_a_curve(launch, decode, prefill):
    fit = fit_curve(made_curve(launch, decode, prefill), PRO, MI355X)
    # The made prefill does not stretch its own launches by 1/decode, 1.4 ms of about 100: 2 % is
    # twice that.
    assert fit.launch == pytest.approx(launch, rel=0.02)
    assert fit.decode_efficiency == pytest.approx(decode, rel=0.02)
    assert fit.prefill_efficiency == pytest.approx(prefill, rel=0.02)
    assert fit.worst_error < 0.02
    assert all(sum(point.shares.values()) == pytest.approx(1) for point in fit.points)


def test_the_efficiencies_of_a_fit_make_its_curve_again():
    fit = fit_curve(made_curve(10e-6, 0.4, 0.3), PRO, MI355X)
    for each in fit.points:
        again = limit_point(
            PRO,
            MI355X,
            Layout.parse(each.point.layout),
            each.point.concurrency,
            WORKLOAD,
            fit.efficiency(),
        )
        assert again.cycle == pytest.approx(each.fitted_cycle, rel=0.02)  # the same 1.4 ms as above


def test_a_beaten_point_takes_no_part():
    curve = made_curve(10e-6, 0.4, 0.3)
    slow = dataclasses.replace(
        curve.points[-1],
        concurrency=512,
        tput_per_gpu=curve.points[-1].tput_per_gpu / 3,
        intvty=curve.points[-1].intvty / 3,
    )
    with_slow = dataclasses.replace(curve, points=(*curve.points, slow))
    fit, alone = fit_curve(with_slow, PRO, MI355X), fit_curve(curve, PRO, MI355X)
    assert (fit.launch, fit.decode_efficiency) == pytest.approx(
        (alone.launch, alone.decode_efficiency)
    )
    assert [point.fitted for point in fit.points] == [True] * 5 + [False]


def test_published_curves_get_better_in_what_the_work_of_their_days_aimed_at():
    fits = [fit_curve(curve, PRO, MI355X) for curve in load_published().curves]
    launches = [fit.launch for fit in fits]
    assert launches == sorted(launches, reverse=True)
    assert all(fit.decode_efficiency < 0.5 for fit in fits)
    assert not fits[0].prefill_resolved


def test_the_mean_context_by_hand():
    """8192/1024 nominal are 7372.8 and 921.6 on average: a decode step sees the prompt and half of
    the output, 7833.6 tokens. The indexer reads 132 bytes for each fourth of them in 30 layers."""
    point = limit_point(PRO, MI355X, Layout(8), 16, Workload.nominal(8192, 1024))
    assert (point.decode.context, point.prompt.context) == (7834, 7373)
    scan = next(each for each in point.decode.components if each.name == "index_scan")
    assert scan.bytes == pytest.approx(16 * 30 * 132 * 7834 / 4)
