"""Optimizers for whole models: which parameter follows which rule, with decay, resume and ranks done right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "APOLLO": "hf_effi.optim.apollo_rule",
    "EffiOptimizer": "hf_effi.optim.base",
    "FRUGAL": "hf_effi.optim.frugal_rule",
    "GroupRules": "hf_effi.optim.roles",
    "MarsM": "hf_effi.optim.mars_muon",
    "MatrixView": "hf_effi.optim.matrix_views",
    "MuonAdamW": "hf_effi.optim.muon_adamw",
    "NAdamW": "hf_effi.optim.nesterov",
    "OptimizerFactory": "hf_effi.optim.factory",
    "OptimizerReport": "hf_effi.optim.report",
    "ParameterRole": "hf_effi.optim.roles",
    "apollo": "hf_effi.optim.apollo_rule",
    "apollo_mini": "hf_effi.optim.apollo_rule",
    "frugal": "hf_effi.optim.frugal_rule",
    "SplitOptimizer": "hf_effi.optim.split",
    "holds_average": "hf_effi.optim.schedule_free",
    "is_schedule_free": "hf_effi.optim.schedule_free",
    "lamb": "hf_effi.optim.adapters",
    "lars": "hf_effi.optim.adapters",
    "mars_m": "hf_effi.optim.mars_muon",
    "muon": "hf_effi.optim.muon_adamw",
    "nadamw": "hf_effi.optim.nesterov",
    "optimizer_factory": "hf_effi.optim.factory",
    "optimizer_names": "hf_effi.optim.names",
    "optimizer_report": "hf_effi.optim.factory",
    "parameter_groups": "hf_effi.optim.factory",
    "parameter_roles": "hf_effi.optim.roles",
    "prodigy": "hf_effi.optim.adapters",
    "recommend_optimizer": "hf_effi.functional.optimizer_table",
    "soap": "hf_effi.optim.adapters",
    "use_optimizer": "hf_effi.optim.factory",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from ..functional.optimizer_table import recommend_optimizer as recommend_optimizer
    from .adapters import lamb as lamb
    from .adapters import lars as lars
    from .adapters import prodigy as prodigy
    from .adapters import soap as soap
    from .apollo_rule import APOLLO as APOLLO
    from .apollo_rule import apollo as apollo
    from .apollo_rule import apollo_mini as apollo_mini
    from .base import EffiOptimizer as EffiOptimizer
    from .factory import OptimizerFactory as OptimizerFactory
    from .factory import optimizer_factory as optimizer_factory
    from .factory import optimizer_report as optimizer_report
    from .factory import parameter_groups as parameter_groups
    from .factory import use_optimizer as use_optimizer
    from .frugal_rule import FRUGAL as FRUGAL
    from .frugal_rule import frugal as frugal
    from .mars_muon import MarsM as MarsM
    from .mars_muon import mars_m as mars_m
    from .matrix_views import MatrixView as MatrixView
    from .muon_adamw import MuonAdamW as MuonAdamW
    from .muon_adamw import muon as muon
    from .names import optimizer_names as optimizer_names
    from .nesterov import NAdamW as NAdamW
    from .nesterov import nadamw as nadamw
    from .report import OptimizerReport as OptimizerReport
    from .roles import GroupRules as GroupRules
    from .roles import ParameterRole as ParameterRole
    from .roles import parameter_roles as parameter_roles
    from .schedule_free import holds_average as holds_average
    from .schedule_free import is_schedule_free as is_schedule_free
    from .split import SplitOptimizer as SplitOptimizer

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
