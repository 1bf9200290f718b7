"""Hydra's answers, kept: one takes 0.2 s, and the tests load an experiment with other fields a thousand times."""

from contextlib import suppress
from copy import deepcopy
from functools import cache

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from configs import schema

hydras, of_files = schema.composed, cache(schema.composed)


def composed(*words):
    """As `configs.schema.composed`: the answer to an experiment and its groups is kept, fields are set in a copy."""
    groups = [word for word in words if (schema.CONFIGS / schema.field_of(word)).is_dir()]
    with suppress(HydraException, OmegaConfBaseException):  # what is wrong with the words is Hydra's to say
        fields = OverridesParser.create().parse_overrides([word for word in words if word not in groups])
        if not any(field.is_sweep_override() for field in fields):
            config = deepcopy(of_files(*groups))
            ConfigLoaderImpl._apply_overrides_to_config(fields, config)
            return config
    return hydras(*words)
