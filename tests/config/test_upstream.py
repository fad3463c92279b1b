"""What is read from the libraries' source files is what the libraries have."""

from __future__ import annotations

import dataclasses

from prunetune.config.schema import RunConfig
from prunetune.config.upstream import OWN_SETTING, scheduler_names, sft_fields


def test_fields_read_from_source_are_the_class_fields() -> None:
    from trl import SFTConfig

    assert sft_fields() == {
        field.name for field in dataclasses.fields(SFTConfig) if field.init and field.name[0] != "_"
    }


def test_schedules_read_from_source_are_the_enum() -> None:
    from transformers.trainer_utils import SchedulerType

    assert scheduler_names() == {member.value for member in SchedulerType}


def test_own_settings_exist_on_both_sides() -> None:
    assert set(OWN_SETTING) <= sft_fields()
    config = RunConfig(model="a", target="60%")
    for key in set(OWN_SETTING.values()):
        value: object = config
        for part in key.split("."):
            value = getattr(value, part)
