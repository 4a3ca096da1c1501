"""The report as dict, text and page: complete, deterministic, escaped, at home offline."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pq_compile.errors import Refused
from pq_compile.options import Options
from pq_compile.reporting import Report
from pq_compile.svg import block, rails
from pq_compile.table import change, not_quantised, not_reordered, ranges, size, split
from tests import toy_plans
from tests.conftest import Golden

VOID = {"meta", "br", "wbr", "input", "link", "img"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers the text and the attributes that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]
        assert not any(key.startswith("on") for key, _ in attrs), attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def page(report: Report, folder: Path) -> str:
    report.to_html(folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_terminal_report(golden: Golden) -> None:
    golden(str(toy_plans.report()))


def test_the_terminal_report_fits_100_columns() -> None:
    long = "deep." * 30 + "linear"
    report = toy_plans.report()
    (section,) = report.sections
    first, *rest = section.plan.linears
    renamed = replace(first, linear=replace(first.linear, name=long), reason="words " * 40)
    plan = replace(section.plan, linears=(renamed, *rest))
    text = str(Report((replace(section, plan=plan),), Options()))
    assert max(map(len, text.splitlines())) <= 100


def test_the_dict_has_the_documented_keys() -> None:
    found = toy_plans.report().to_dict()
    assert {*found["summary"]} >= {
        "linears_total", "linears_quantised", "free_flop_share", "weight_bytes_before",
        "weight_bytes_after", "recipe", "format", "scheme", "calibration_calls", "phase",
        "warnings",
    }  # fmt: skip
    assert {*found["linears"][0]} >= {
        "name", "in_features", "out_features", "flops", "group", "free", "accepted",
        "error_before", "error_after", "route", "bits_per_weight", "reason",
    }  # fmt: skip
    assert {*found["groups"][0]} >= {
        "name", "axes", "structure", "pinned_by", "accepted", "reason", "error_before",
        "error_after", "alpha",
    }  # fmt: skip
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_summary_counts_and_weighs() -> None:
    summary = toy_plans.report().to_dict()["summary"]
    assert (summary["linears_total"], summary["linears_quantised"]) == (9, 8)
    assert summary["linears_reordered"] == 2
    # Per block: to_v 64 x 64, to_out 64 x 64 free, up 64 x 128, down 128 x 64 free.
    assert summary["free_flop_share"] == 0.5
    assert summary["error_before"] == pytest.approx(0.02, rel=1e-12)
    # to_v and up, 1 + 2 parts of FLOPs, stay at 0.02; to_out, 1 part, ends at 0.015 and 0.014.
    assert summary["error_after"] == pytest.approx((6 * 0.02 + 0.015 + 0.014) / 8, rel=1e-12)


def test_linears_outside_blocks_count_where_no_block_repeats() -> None:
    report = toy_plans.report()
    (section,) = report.sections
    embed = replace(section.plan.linears[0], free=True)
    alone = replace(section, plan=replace(section.plan, linears=(embed,), verdicts=()))
    assert Report((alone,), Options()).to_dict()["summary"]["free_flop_share"] == 1.0


def test_sections_add_up() -> None:
    (section,) = toy_plans.report().sections
    second = replace(section, phase="observing 12 of 64", calibration_calls=12)
    found = Report((section, second), Options()).to_dict()
    assert found["summary"]["phase"] == "serving; observing 12 of 64"
    assert found["summary"]["linears_total"] == 18
    assert found["summary"]["weight_bytes_before"] == 180_000
    assert found["summary"]["calibration_calls"] == 64
    assert len(found["summary"]["warnings"]) == 1
    assert found["timings"] == {"plan": 3.0}


def test_an_error_that_is_no_number_was_not_measured() -> None:
    (section,) = toy_plans.report().sections
    bad = [replace(one, error_before=float("nan")) for one in section.plan.linears]
    plan = replace(section.plan, linears=tuple(bad))
    found = Report((replace(section, plan=plan),), Options()).to_dict()
    assert {one["error_before"] for one in found["linears"]} == {None}
    assert found["summary"]["error_before"] is None


def test_an_empty_report_prints_in_every_form(tmp_path: Path) -> None:
    report = Report((), Options())
    assert str(report).startswith("permuquant: nothing compiled yet\n")
    assert "nothing compiled yet" in Page(page(report, tmp_path)).text
    assert report.to_dict()["linears"] == []


def test_a_group_without_a_verdict_says_that_nothing_was_judged() -> None:
    (section,) = toy_plans.report().sections
    plan = replace(section.plan, verdicts=())
    observing = replace(section, plan=plan, phase="observing 3 of 64")
    reasons = [g["reason"] for g in Report((observing,), Options()).to_dict()["groups"]]
    assert reasons[2] == "no order has been judged (observing 3 of 64)"
    rtn = replace(observing, plan=replace(plan, recipe="rtn"))
    reasons = [g["reason"] for g in Report((rtn,), Options()).to_dict()["groups"]]
    assert reasons[2] == "recipe rtn keeps every order"


def test_blocks_of_a_kind_share_one_reason() -> None:
    found = toy_plans.report().to_dict()
    assert not_reordered(found) == [
        ("embed.weight[1]", "pinned by graph input x."),
        ("embed.weight[0]", "pinned by add, which also reads y."),
        ("blocks.{0..1}.ff.up.weight[0]", "gain 1.0..2.0% is not above tau 2.0%."),
    ]
    assert not_quantised(found) == [("embed", "it reads the model's input.")]


def test_a_range_of_negative_numbers_keeps_its_signs() -> None:
    linears = [
        {"name": f"blocks.{b}.up", "route": "keep", "reason": f"gain {gain}% of block-2"}
        for b, gain in enumerate(("-2.5", "0.8", "-4.4"))
    ]
    (folded,) = not_quantised({"linears": linears})
    assert folded == ("blocks.{0..2}.up", "gain -4.4..0.8% of block-2.")


def test_a_reason_that_names_its_own_block_folds() -> None:
    linears = [
        {"name": f"blocks.{b}.up", "route": "keep", "reason": f"blocks.{b}.gate shares its weight"}
        for b in (0, 1, 2, 5)
    ]
    (folded,) = not_quantised({"linears": linears})
    assert folded == ("blocks.{0..2,5}.up", "blocks.*.gate shares its weight.")


def test_a_reason_is_said_once_for_all_it_holds_for() -> None:
    linears = [
        {"name": name, "route": "keep", "reason": "skipped by name"}
        for name in ("embed", "blocks.0.up", "blocks.1.up", "head")
    ]
    names = "embed, blocks.{0..1}.up, head"
    assert not_quantised({"linears": linears}) == [(names, "skipped by name.")]


def test_a_quantised_linear_without_a_group_has_its_sentence() -> None:
    (section,) = toy_plans.report().sections
    lonely = [replace(one, group=None) for one in section.plan.linears[:2]]
    plan = replace(section.plan, linears=tuple(lonely))
    found = Report((replace(section, plan=plan),), Options()).to_dict()
    assert ("blocks.0.attn.to_v", "its input belongs to no group of axes.") in not_reordered(found)


def test_the_page_is_sound_and_says_every_reason(tmp_path: Path) -> None:
    report = toy_plans.report()
    text = Page(page(report, tmp_path)).text
    found = report.to_dict()
    for _, why in [*not_reordered(found), *not_quantised(found)]:
        assert why in text
    for linear in found["linears"]:
        assert linear["name"] in text
        assert linear["reason"] in text
    assert found["summary"]["warnings"][0] in text


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    text = page(toy_plans.report(), tmp_path)
    parsed = Page(text)
    assert all(link.startswith("#") for link in parsed.links)
    assert not re.search(r"https?:|@import|url\(|//[a-z]", text)
    assert not parsed.tags & {"link", "img", "iframe", "object", "embed"}
    assert "default-src 'none'" in text


def test_every_anchor_leads_somewhere(tmp_path: Path) -> None:
    text = page(toy_plans.report(), tmp_path)
    targets = {link.removeprefix("#") for link in Page(text).links}
    assert len(targets) == 9
    assert all(f'id="{target}"' in text for target in targets)


def test_only_times_differ_between_equal_runs(tmp_path: Path) -> None:
    one, same, other = (page(toy_plans.report(s), tmp_path) for s in (1.5, 1.5, 2.5))
    assert one == same
    assert one != other
    for timed in ('data-value="{}"', ">{} s<"):
        one, other = one.replace(timed.format(1.5), ""), other.replace(timed.format(2.5), "")
    assert one == other


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    report = toy_plans.hostile_report()
    text = page(report, tmp_path)
    parsed = Page(text)
    assert text.count("<script>") == 1
    assert text.count("alert('a&b')") == 0
    assert parsed.text.count(toy_plans.HOSTILE) >= 8
    assert "<script>" not in report._repr_html_()


def test_a_name_that_is_no_text_can_be_written(tmp_path: Path) -> None:
    (section,) = toy_plans.report().sections
    report = Report((replace(section, warnings=("lone surrogate \ud800",)),), Options())
    assert "lone surrogate &#55296;" in page(report, tmp_path)


def test_a_folder_as_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="it is a folder; name a file inside it"):
        toy_plans.report().to_html(tmp_path)


def test_missing_folders_are_made(tmp_path: Path) -> None:
    toy_plans.report().to_html(str(tmp_path / "a" / "b" / "report.html"))
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["report.html"]


def test_the_figure_shows_one_block_and_its_groups() -> None:
    drawn = block(toy_plans.plan(), toy_plans.groups())
    assert drawn.name == "blocks.0"
    assert [*drawn.modules] == [
        f"blocks.0.{name}" for name in ("attn.to_out", "attn.to_v", "ff.down", "ff.up", "norm")
    ]
    assert drawn.modules["blocks.0.attn.to_out"] == (
        ("in", "blocks.0.attn.to_v.weight[0]"),
        ("out", "embed.weight[0]"),
    )
    assert drawn.modules["blocks.0.norm"] == (("along", "embed.weight[0]"),)
    assert [group.name for group in drawn.groups] == [
        "embed.weight[0]",
        "blocks.0.attn.to_v.weight[0]",
        "blocks.0.ff.up.weight[0]",
    ]
    Page(rails(drawn))


def test_a_figure_too_large_to_read_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pq_compile.svg.NODES", 4)
    monkeypatch.setattr("pq_compile.svg.RAILS", 1)
    drawn = block(toy_plans.plan(), toy_plans.groups())
    assert drawn.left_out == (1, 2)
    assert rails(drawn).count('class="badge"') == 1
    text = Page(page(toy_plans.report(), tmp_path)).text
    assert "Not drawn: modules 1, groups 2." in text


def test_a_crowded_figure_keeps_free_groups_and_far_reaching_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pq_compile.svg.RAILS", 2)
    drawn = block(toy_plans.plan(), toy_plans.groups())
    assert [g.name for g in drawn.groups] == [
        "blocks.0.attn.to_v.weight[0]",
        "blocks.0.ff.up.weight[0]",
    ]
    assert drawn.left_out == (0, 1)


def test_names_around_the_block_index() -> None:
    assert split("blocks.12.attn.to_out.0") == ("blocks.", 12, ".attn.to_out.0")
    assert split("blocks.1.up.weight[0]#1") == ("blocks.", 1, ".up.weight[0]#1")
    assert split("x_embedder") == ("x_embedder", None, "")


@pytest.mark.parametrize(
    ("indices", "text"), [([4], "4"), ([2, 0, 1, 1], "{0..2}"), ([0, 2, 3], "{0,2..3}")]
)
def test_indices_print_as_ranges(indices: list[int], text: str) -> None:
    assert ranges(indices) == text


def test_sizes_and_changes_print_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1536, 3 << 20, 5 << 40)] == [
        "0 bytes",
        "1023 bytes",
        "1.5 KiB",
        "3.0 MiB",
        "5120.00 GiB",
    ]
    assert [change(2.0, 1.5), change(1.0, 1.0), change(0.0, 1.0), change(None, 1.0)] == [
        "-25.0%",
        "0.0%",
        "-",
        "-",
    ]
