"""Which objective reads which setting: the table, the page, the config, and what a recipe sets in vain."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opd.config.load import load_config, unread
from opd.config.objective import OBJECTIVES, ObjectiveConfig
from opd.objectives.losses import LOSSES

ROOT = Path(__file__).parents[3]


def test_the_page_says_what_the_table_says() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", (ROOT / "docs/objectives.md").read_text(), re.M)
    page = {name: rest.split("|") for name, rest in rows if rest.count("|") == 3}
    assert page.keys() == OBJECTIVES.keys()
    for name, (sources, _, settings, paper) in page.items():
        o = OBJECTIVES[name]
        assert (sources.strip(), re.findall(r"`(\w+)`", settings)) == (", ".join(o.sources), list(o.settings))
        assert o.paper in paper, name


def test_every_objective_has_a_loss() -> None:
    assert OBJECTIVES.keys() == LOSSES.keys()


def test_every_setting_is_somebodys() -> None:
    named = {k for o in OBJECTIVES.values() for k in o.settings}
    assert named | {"name", "lambda_", "average", "reference"} == set(ObjectiveConfig.model_fields)
    for o in OBJECTIVES.values():
        assert {*o.needs, *o.needs.values(), *filter(None, [o.weight])} <= {*o.settings}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], []),
        (["objective.tau=1"], ["objective.tau is not read by xopd"]),
        (["objective.tau=2.0"], []),  # the default
        (["objective.name=forward_kl", "objective.beta=0.1"], ["objective.beta is not read by forward_kl"]),
        (["objective.name=uld", "objective.beta=0.1"], ["objective.beta is not read by uld without objective.hybrid"]),
        (["objective.name=uld", "objective.beta=0.1", "objective.hybrid=true"], []),
        (
            ["objective.name=kd", "rollout.source=teacher", "objective.mu=0", "objective.tau=1"],
            ["objective.tau is not read by kd with objective.mu 0"],
        ),
        (["teacher.field=skill"], ["teacher.field is not read by teacher.kind local"]),
        (["rollout.student_share=0.1"], ["rollout.student_share is not read by rollout.source student"]),
        (["objective.name=jsd", "rollout.source=mix", "rollout.student_share=0.1"], []),
        (["teacher.kind=routed", "teacher.path=", "teacher.field=x", "teacher.routes={a: {kind: self}}"], []),
    ],
)
def test_what_nothing_reads_is_named(overrides: list[str], told: list[str]) -> None:
    clip = [] if not any(o.startswith("objective.name") for o in overrides) else ["objective.advantage_clip="]
    assert unread(load_config(ROOT / "recipes/tiny/2_xopd.yaml", [*clip, *overrides])) == told
