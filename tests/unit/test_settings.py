"""Sections of settings."""

from __future__ import annotations

from opd.config.load import load_config


def test_a_changed_recipe_is_a_copy() -> None:
    config = load_config("recipes/tiny/2_xopd.yaml")
    before = config.model_dump()
    other = config.changed({"rollout.server.threads": 7, "rollout.urls": ["http://a"], "student.lora": None})
    assert (other.rollout.server.threads, other.rollout.urls, other.student.lora) == (7, ["http://a"], None)
    assert config.model_dump() == before and other.teacher is config.teacher
