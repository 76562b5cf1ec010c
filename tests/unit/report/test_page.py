"""Sections as Markdown and as HTML: names come through as they are, whatever they hold."""

import html
import re

import pytest

from dsv4_plugin.report.page import Section, markdown, page

NAMES = ("a|b", "<script>x</script>", "*bold*", "`code`", "[text](target)", "back\\slash", "a_b_c")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is(name):
    section = Section(name, (f"of {name}",), ((("curve", name), [[name, "1"]]),))
    shown = page([section], "<svg/>")
    assert len(re.findall(re.escape(html.escape(name, quote=False)), shown)) == 5
    assert "<script" not in shown and "<em>" not in shown and "<code>" not in shown
    # the row stays one of two cells
    assert len(re.findall("<td", shown)) == 2


def test_the_figure_is_inside_the_page_and_beside_the_markdown():
    section = Section("Curves", figure=True)
    assert "![Pareto curves](pareto.png)" in markdown([section])
    shown = page([section], '<?xml version="1.0"?><svg id="drawn"/>')
    assert '<svg id="drawn"/>' in shown and "<img" not in shown and "<?xml" not in shown
