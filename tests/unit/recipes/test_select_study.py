"""The study of `opd data select` on the tiny world: what is chosen from, shares, and the table by skill."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "recipes/tiny"))

import select_study  # noqa: E402

from opd.study.grid import Study  # noqa: E402
from opd.study.spec import read_study  # noqa: E402

SPEC = read_study(ROOT / "recipes/tiny/select_study.yaml")


def records(**counts: int) -> list[dict[str, Any]]:
    """`counts` records of each skill, of 2 s; answers of three words in arithmetic and one elsewhere."""
    said = {"arithmetic": "it is four."}
    return [
        {"id": f"{g}-{i}", "group": g, "seconds": 2.0, "response": said.get(g, "four.")}
        for g, n in counts.items()
        for i in range(n)
    ]


def test_a_skill_is_thinned_to_its_share_and_the_others_are_kept() -> None:
    found = select_study.thinned(records(arithmetic=50, sort=60, days=30), "arithmetic", 0.1)
    groups = [r["group"] for r in found]
    assert (groups.count("arithmetic"), groups.count("sort"), groups.count("days")) == (10, 60, 30)
    assert [r["id"] for r in found[:10]] == [f"arithmetic-{i}" for i in range(10)]


def test_runs_train_on_what_their_seed_chose() -> None:
    names = {select_study.chosen(SPEC, w, m, s) for w in SPEC.worlds for m in SPEC.methods for s in SPEC.report.seeds}
    assert len(names) == len(SPEC.worlds) * len(SPEC.methods) * len(SPEC.report.seeds) >= 20
    assert Path("runs/select/rare/gamma-5/seed_3.jsonl") in names
    assert [select_study.exponent(m) for m in SPEC.methods] == [0.0, 5.0]
    rates = {tuple(m.rates or SPEC.rates) for m in SPEC.methods.values()}
    assert len(rates) == 1 and SPEC.reference == "gamma-0"  # what is compared differs in the texts alone


def test_texts_are_chosen_again_when_settings_or_sources_change(tmp_path: Path) -> None:
    out, source = tmp_path / "seed_0.jsonl", tmp_path / "corpus.jsonl"
    wanted = {"hours": 0.05, "gamma": 5.0, "seed": 0}
    source.touch()
    assert not select_study.is_made(out, wanted, [source])
    out.touch()
    (tmp_path / "seed_0.select").mkdir()
    about = tmp_path / "seed_0.select/select.json"
    about.write_text(json.dumps({"settings": wanted | {"clusters": 100}}))
    assert select_study.is_made(out, wanted, [source])
    assert not select_study.is_made(out, wanted | {"hours": 0.1}, [source])
    os.utime(source, (about.stat().st_mtime + 1,) * 2)
    assert not select_study.is_made(out, wanted, [source])


def test_the_study_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = Study(Path("recipes/tiny/select_study.yaml"))
    assert len(study.rows) == len(SPEC.worlds) * (1 + len(SPEC.methods)) and len(SPEC.report.seeds) >= 5


def test_misalignment_by_skill_is_a_mean_over_tokens(tmp_path: Path) -> None:
    lines: list[Any] = [
        {"fields": {"group": "days"}, "misalignment/sampled": {"nats": 3.0, "tokens": 4}},
        {"fields": {"group": "days"}, "misalignment": {"nats": 1.0, "tokens": 12}},
        {"fields": {"group": "sort"}, "misalignment": {"nats": 1.0, "tokens": 5}},
        {"fields": {"group": "sort"}, "misalignment": None},
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert select_study.by_skill(tmp_path) == {"days": 0.25, "sort": 0.2}


def test_purity_is_the_share_of_the_commonest_skill() -> None:
    def asked(skill: str, text: str) -> dict[str, Any]:
        return {"id": text, "group": skill, "messages": [{"role": "user", "content": text}]}

    apart = [asked("a", f"apple w{i}") for i in range(100)] + [asked("b", f"boat v{i}") for i in range(100)]
    assert select_study.purity(apart) > 0.9
    mixed = [asked("ab"[i % 2], f"word{i // 2 % 10}") for i in range(200)]  # the texts do not tell skills apart
    assert select_study.purity(mixed) < 0.8


def test_the_table_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/select").mkdir(parents=True)
    monkeypatch.setattr(select_study, "by_skill", lambda folder: {"arithmetic": 0.7, "sort": 0.01})
    monkeypatch.setattr(select_study, "purity", lambda corpus: 0.9)
    corpus = select_study.corpus_of("rare")
    corpus.parent.mkdir(parents=True)
    select_study.write(corpus, records(arithmetic=10, sort=90))
    for method, skill in (("gamma-0", "sort"), ("gamma-5", "arithmetic")):
        for seed in SPEC.report.seeds:
            path = select_study.chosen(SPEC, "rare", method, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            select_study.write(path, [*records(**{skill: 3}), *records(days=1)])

    def row(name: str, m: float, right: float, rate: float | None) -> dict[str, Any]:
        by_seed, groups = {}, {}
        for seed in SPEC.report.seeds:  # m and right are the means, 0.01 · √2.5 their standard deviation
            off = 0.01 * (seed - 2)
            misaligned, heard = {"arithmetic": m + off, "sort": 0.01}, {"arithmetic": right + off, "sort": 1.0}
            groups[str(seed)] = {"misalignment": misaligned, "speech": heard, "text": {}}
            by_seed[str(seed)] = {"misalignment": m / 2, "accuracy/speech": right / 2}
        found = {"name": name, "rate": rate, "by_seed": by_seed, "groups_by_seed": groups}
        return found | {"complete": name != "open", "state": "2 of 5 seeds finished"}

    rows = [row("base", 0.6, 0.1, None), row("gamma-0", 0.4, 0.3, 4e-4), row("gamma-5", 0.2, 0.5, 8e-4)]
    study = tmp_path / SPEC.out / "study.json"
    study.parent.mkdir(parents=True)
    study.write_text(json.dumps({"worlds": [{"name": "rare", "rows": rows}, {"name": "natural", "rows": []}]}))
    select_study.report(SPEC, ["rare"])
    lines = (tmp_path / "runs/select/select.md").read_text().splitlines()
    assert "finds arithmetic the weakest" in lines[0] and "rates gamma-0 0.0004, gamma-5 0.0008" in lines[0]
    # 3 of 4 texts, all of 2 s; half of the interval is t(0.975, 4) · 0.01 · √2.5 / √5
    m = "0.600 | 0.400 ± 0.020 | 0.200 ± 0.020 | -0.200 ± 0.000"
    assert f"| **arithmetic** | 10 | 0 | 75 | 0.70 | {m} | 10.0 | 30.0 ± 2.0 | 50.0 ± 2.0 | +20.0 ± 0.0 |" in lines
    assert any(line.startswith("| sort | 90 | 75 | 0 | 0.01 |") for line in lines)
    assert any(line.startswith("| all |  |  |  |  | 0.300 | 0.200 ± 0.000 |") for line in lines)
    # a tenth of the texts, a quarter of the words: 0.25 · 0.4 + 0.75 · 0.01, 0.1 · 0.3 + 0.9 · 1.0
    (mixed,) = [line for line in lines if line.startswith("| as in the corpus |")]
    assert "| 0.108 ± 0.005 |" in mixed and "| 93.0 ± 0.2 |" in mixed and "| +2.0 ± 0.0 |" in mixed
    (found,) = json.loads((tmp_path / "runs/select/select.json").read_text())
    assert found["weak"] == "arithmetic" and found["methods"]["gamma-5"]["texts"] == [4] * 5
    study.write_text(json.dumps({"worlds": [{"name": "rare", "rows": [*rows, row("open", 0, 0, None)]}]}))
    with pytest.raises(ValueError, match="rare/open is not complete: 2 of 5 seeds finished"):
        select_study.report(SPEC, ["rare"])
