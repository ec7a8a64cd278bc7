"""Optimizers for whole models: which parameter follows which rule, with decay, resume and ranks done right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "EffiOptimizer": "hf_effi.optim.base",
    "GroupRules": "hf_effi.optim.roles",
    "MarsM": "hf_effi.optim.mars_m",
    "MatrixView": "hf_effi.optim.matrix_views",
    "MuonAdamW": "hf_effi.optim.muon",
    "NAdamW": "hf_effi.optim.nadamw",
    "OptimizerFactory": "hf_effi.optim.factory",
    "OptimizerReport": "hf_effi.optim.report",
    "ParameterRole": "hf_effi.optim.roles",
    "mars_m": "hf_effi.optim.mars_m",
    "muon": "hf_effi.optim.muon",
    "nadamw": "hf_effi.optim.nadamw",
    "optimizer_factory": "hf_effi.optim.factory",
    "optimizer_names": "hf_effi.optim.names",
    "optimizer_report": "hf_effi.optim.factory",
    "parameter_groups": "hf_effi.optim.factory",
    "parameter_roles": "hf_effi.optim.roles",
    "use_optimizer": "hf_effi.optim.factory",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from .base import EffiOptimizer as EffiOptimizer
    from .factory import OptimizerFactory as OptimizerFactory
    from .factory import optimizer_factory as optimizer_factory
    from .factory import optimizer_report as optimizer_report
    from .factory import parameter_groups as parameter_groups
    from .factory import use_optimizer as use_optimizer
    from .mars_m import MarsM as MarsM
    from .mars_m import mars_m as mars_m
    from .matrix_views import MatrixView as MatrixView
    from .muon import MuonAdamW as MuonAdamW
    from .muon import muon as muon
    from .nadamw import NAdamW as NAdamW
    from .nadamw import nadamw as nadamw
    from .names import optimizer_names as optimizer_names
    from .report import OptimizerReport as OptimizerReport
    from .roles import GroupRules as GroupRules
    from .roles import ParameterRole as ParameterRole
    from .roles import parameter_roles as parameter_roles

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
