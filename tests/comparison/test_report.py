"""The report says what the numbers say."""

import copy
import json
from pathlib import Path
from statistics import fmean, stdev

import pytest

from bitsmoe_modifier.comparison.report import write_report
from bitsmoe_modifier.evaluation.columns import kld_error, summary, table
from bitsmoe_modifier.pages.comparison import markdown
from bitsmoe_modifier.pages.verdicts import headline, headliner, next_larger, of_model, verdict, without_folders
from bitsmoe_modifier.sources.demo import demo_asset
from entries import FAILED, GPTQ, REFERENCE, arm, ours, report

# ------------------------------------------------------------------------------------------------- sentences


def test_verdict_of_a_win():
    said = verdict(ours("bitsmoe_2_0", 2.0, 0.0040), GPTQ[1])
    assert said == (
        "bitsmoe_2_0 (2.00 bits per expert weight) has a KL divergence 60 % lower than gptq_w3 (3.13 bits): "
        "4.00 against 10.10 × 10⁻³ nats."
    )


def test_verdict_of_a_miss():
    said = verdict(ours("bitsmoe_2_0", 2.0, 0.0106), GPTQ[1])
    assert said == (
        "bitsmoe_2_0 (2.00 bits per expert weight) misses gptq_w3 (3.13 bits) by 5.0 % in KL divergence: "
        "10.60 against 10.10 × 10⁻³ nats."
    )


def test_verdict_of_a_tie():
    assert "the same KL divergence" in verdict(ours("x", 2.0, 0.0101), GPTQ[1])


@pytest.mark.parametrize(("stderr", "unsure"), [(1e-5, False), (5e-4, True)])
def test_verdict_says_when_the_difference_is_within_the_error(stderr, unsure):
    said = verdict(ours("x", 2.0, 0.0100, kld_stderr=stderr), GPTQ[1] | {"kld_stderr": stderr})
    assert ("within the sampling error" in said) is unsure


def test_headline_is_the_most_that_is_saved():
    arms = [*GPTQ, ours("bitsmoe_1_6", 1.6, 0.02), ours("bitsmoe_2_0", 2.0, 0.004)]
    assert headline(arms).startswith("bitsmoe_2_0 (2.00")
    assert headline(arms) == (
        "bitsmoe_2_0 (2.00 bits per expert weight) is closer to the original than gptq_w3 (3.13 bits): KL divergence "
        "4.00 ± 0.01 against 10.10 ± 0.01 × 10⁻³ nats; file 36 % smaller."
    )
    assert "than gptq_w4 (4.13 bits)" in headline([*arms, ours("bitsmoe_2_5", 2.5, 0.002)])
    # 1.6 bits against 4.13 save more than 2.5 against 4.13
    arms.append(ours("small", 1.6, 0.0025))
    assert headline(arms).startswith("small (1.60 bits per expert weight) is closer to the original than gptq_w4")


def test_the_headline_names_the_model_and_what_the_demo_cannot_show():
    arms = [*GPTQ, ours("bitsmoe_2_0", 2.0, 0.002)]
    assert of_model(report(arms)) == f"On bookmoe: {headline(arms)}"
    said = of_model(report(arms) | {"model": {"name": demo_asset("docmoe")}})
    assert said.startswith(f"On docmoe: {headline(arms)}")
    assert "real language-model weights" in said


@pytest.mark.parametrize(("kld", "said"), [(0.00299, "as close as gptq_w4"), (0.0031, "misses gptq_w4 (4.13")])
def test_headline_where_we_tie_or_lose(kld, said):
    """A difference within twice the error is no win, and a loss is called one."""
    rival = GPTQ[2] | {"kld_stderr": 2e-5}
    assert said in headline([rival, ours("mine", 2.0, kld, kld_stderr=2e-5)])


def test_runs_on_the_same_rows_are_compared_row_by_row():
    """Rows that are hard for one are hard for the other: as of independent runs, a clear loss would pass for a tie."""
    hard = [0.001, 0.002, 0.003, 0.010, 0.030, 0.002]
    rows = {"gptq_w3": hard, "mine": [1.3 * kld + 0.0001 * (place % 2) for place, kld in enumerate(hard)]}
    known = {name: {"kld_mean": fmean(row), "kld_stderr": stdev(row) / 6**0.5} for name, row in rows.items()}
    rival, mine = GPTQ[1] | known["gptq_w3"], ours("mine", 2.0, 0.0) | known["mine"]
    assert "as close as" in headline([rival, mine])
    assert "within the sampling error" in verdict(mine, rival)
    assert [row[2][1] for row in summary(REFERENCE, [rival, mine])[1]] == ["", "best", "tie"]

    rows["mine"] = [kld + 0.002 + 0.0001 * (place % 2) for place, kld in enumerate(hard)]
    mine |= {"kld_mean": fmean(rows["mine"]), "kld_rows": rows["mine"]}
    rival |= {"kld_rows": rows["gptq_w3"]}
    assert kld_error(mine, rival) == pytest.approx(0.0001 * 0.3**0.5 / 6**0.5)
    assert "misses gptq_w3" in headline([rival, mine])
    assert "within the sampling error" not in verdict(mine, rival)
    assert [row[2][1] for row in summary(REFERENCE, [rival, mine])[1]] == ["", "best", ""]


def test_figures_that_read_the_same_are_all_the_best():
    runs = [ours("a", 1.25001, 0.1), ours("b", 1.2502, 0.2)]
    assert [row[1] for row in summary(REFERENCE, runs)[1][1:]] == [("1.250", "best"), ("1.250", "best")]


def test_headline_never_holds_a_larger_run_against_a_smaller():
    said = headline([GPTQ[0], ours("large", 3.0, 0.001)])
    assert said.startswith("large (3.00 bits per expert weight) has a KL divergence")
    assert "file" not in said


def test_ties_are_marked_as_ties():
    near = ours("near", 2.0, 0.00302, kld_stderr=1e-5)
    runs = [GPTQ[2], near, ours("far", 2.0, 0.0031)]
    lines = table(REFERENCE, runs).splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:]] == [
        "0.00",
        "**3.00 ± 0.01**",
        "3.02 ± 0.01 ≈",
        "3.10 ± 0.01",
    ]
    _, rows = summary(REFERENCE, runs)
    assert [row[2][1] for row in rows] == ["", "best", "tie", ""]


def test_every_figure_has_its_standard_error():
    runs = [
        ours("a", 2.0, 0.004, top1_stderr=0.002, perplexity_stderr=0.03)
        | {"accuracy": {"t": {"acc": 0.5, "stderr": 0.05}}},
        ours("b", 2.0, 0.005, top1_stderr=0.002, perplexity_stderr=0.03)
        | {"accuracy": {"t": {"acc": 0.45, "stderr": 0.05}}},
    ]
    heads, rows = summary(REFERENCE, runs)
    shown = {head: [row[i][0] for row in rows[1:]] for i, head in enumerate(heads)}
    assert shown["same top token, %"] == ["99.60 ± 0.20", "99.50 ± 0.20 ≈"]
    assert shown["perplexity"] == ["10.004 ± 0.030", "10.005 ± 0.030 ≈"]
    assert shown["t, %"] == ["50.0 ± 5.0", "45.0 ± 5.0 ≈"]


def test_the_noise_floor_is_a_row_that_does_not_compete():
    noise = {"how": "", "rows": 32, "perplexity": 1.0, "kld_mean": 0.0002, "kld_stderr": 1e-5, "top1_agreement": 1.0}
    heads, rows = summary(REFERENCE, [GPTQ[2]], noise)
    assert [row[0][0] for row in rows] == ["unquantized", "noise floor", "gptq_w4"]
    floor = dict(zip(heads, rows[1], strict=True))
    assert floor["KLD × 1000"] == ("0.20 ± 0.01", "")
    assert floor["perplexity"] == ("–", ""), "of other rows than the runs'"
    assert [mark for _, mark in rows[2]] == [""] * len(heads), "one run is no contest"


def test_no_folder_of_the_makers_machine():
    made = report([*GPTQ, ours("bitsmoe_2_0", 2.0, 0.004)])
    made["command"] = "bitsmoe compare --model /home/me/models/m --out 'my report' --calibration /data/c.txt"
    made["arms"].append(FAILED | {"error": "OSError: /home/me/models/m/config.json is not there"})
    made["arms"][0] = made["arms"][0] | {"warnings": ["/home/me/cache/x: slow"]}
    made["calibration"]["source"], made["evaluation"]["source"] = "/data/c.txt", "Salesforce/wikitext@test"
    text = markdown(made, None)
    assert "bitsmoe compare --model m --out 'my report' --calibration c.txt" in text
    assert "tokens from c.txt" in text
    assert "Salesforce/wikitext@test" in text
    assert "/home" not in text
    assert "/data" not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("read /home/me/a/b.txt: no", "read b.txt: no"),
        ("--model=/home/me/m", "--model=m"),
        (r"C:\Users\me\m.json", "m.json"),
        ("~/models/m", "m"),
        ("'/data/x/y'", "'y'"),
        ("org/model and 1/2 and KLD/MB", "org/model and 1/2 and KLD/MB"),
        ("https://example.org/a/b", "https://example.org/a/b"),
    ],
)
def test_without_folders(text, shown):
    assert without_folders(text) == shown


def test_the_headline_names_its_run():
    assert headliner([*GPTQ, ours("small", 1.6, 0.02), ours("mine", 2.0, 0.004)]) == "mine"
    assert headliner([ours("alone", 2.0, 0.1)]) == "alone"
    assert headliner(GPTQ) is None


def test_headline_without_that_pair_takes_the_next_larger():
    arms = [GPTQ[0], GPTQ[2], ours("mine", 2.5, 0.004)]
    assert "misses gptq_w4" in headline(arms)


@pytest.mark.parametrize("arms", [[], GPTQ, [ours("a", 2.0, 0.1)]], ids=["none", "one-method", "other-method"])
def test_headline_without_a_pair_says_so(arms):
    assert "nothing to compare" in headline(arms)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(1.6, "gptq_w2"), (2.125, "gptq_w2"), (2.133, "gptq_w2"), (2.2, "gptq_w3"), (4.5, "gptq_w4")],
)
def test_next_larger(bits, expected):
    assert next_larger(ours("x", bits, 0.1), GPTQ)["name"] == expected


def test_a_gptq_attention_beside_bitsmoe_is_not_a_gptq_arm():
    both = ours("both", 2.0, 0.004) | {"modifiers": ["GPTQModifier", "BitsMoEModifier"]}
    assert headline([both, GPTQ[1]]).startswith("both")


# --------------------------------------------------------------------------------------------------- table


def test_the_best_of_every_column_is_bold():
    lines = table(REFERENCE, [*GPTQ, ours("bitsmoe_2_0", 2.0, 0.004)]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(cells) == 7
    column = {title: [row[i] for row in cells[2:]] for i, title in enumerate(cells[0])}
    assert column["model"] == ["unquantized", "gptq_w2", "gptq_w3", "gptq_w4", "bitsmoe_2_0"]
    assert column["bits per expert weight"] == ["16.000", "2.129", "3.129", "4.129", "**2.000**"]
    assert column["KLD × 1000"] == ["0.00", "55.00 ± 0.01", "10.10 ± 0.01", "**3.00 ± 0.01**", "4.00 ± 0.01"]
    assert column["same top token, %"] == ["100.00", "94.50", "98.99", "**99.70**", "99.60"]
    assert cells[0][1:3] == ["bits per expert weight", "KLD × 1000"], "side by side, where a phone shows them"
    # equal values are all best
    assert column["quantize, s"] == ["–", *["**10**"] * 4]


# ------------------------------------------------------------------------------------------------ document


def test_markdown_holds_the_headline_failures_and_warnings():
    warned = GPTQ[0] | {"warnings": ["3 expert projections were set to zero"]}
    text = markdown(report([warned, GPTQ[1], ours("bitsmoe_2_0", 2.0, 0.004), FAILED]), "report.svg")
    assert text.startswith("# Quantization of bookmoe\n\n**On bookmoe: bitsmoe_2_0 (2.00 bits")
    assert "- broken: ValueError: no (log: logs/broken.log)" in text
    assert "- gptq_w2: 3 expert projections were set to zero" in text
    assert "![" in text
    assert "](report.svg)" in text
    assert "128 rows of 256 tokens from c.txt" in text
    assert "run again in bfloat16" in text


def test_markdown_of_failures_only():
    text = markdown(report([FAILED]), None)
    assert "nothing to compare" in text
    assert "![" not in text


def test_write_report_leaves_four_files_and_nothing_half(tmp_path: Path):
    made = report([*GPTQ, ours("bitsmoe_2_0", 2.0, 0.004), arm("rtn", 2.1, 0.2, kind="QuantizationModifier")])
    before = copy.deepcopy(made)
    write_report(made, tmp_path)
    assert made == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md", "report.svg"]
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(made))


def test_write_report_without_a_measured_arm_draws_nothing(tmp_path: Path):
    write_report(report([]), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
