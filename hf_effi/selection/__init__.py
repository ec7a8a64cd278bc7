"""What GRPO spends rollouts and updates on: prompts, groups, completions, and the signals in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "AdaRFT": "hf_effi.selection.adarft",
    "AdvantagePruner": "hf_effi.functional.rollouts",
    "BetaRates": "hf_effi.selection.rates",
    "BufferedPrompts": "hf_effi.selection.stream",
    "D3S": "hf_effi.selection.pruners",
    "DUMP": "hf_effi.selection.dump",
    "DiscoverPrompts": "hf_effi.selection.discover",
    "DurationWeights": "hf_effi.selection.advantages",
    "EmbeddingRates": "hf_effi.selection.rates",
    "EntropicAdvantages": "hf_effi.selection.advantages",
    "FilterChain": "hf_effi.selection.filters",
    "FirstRowsPruner": "hf_effi.selection.pruners",
    "GRESO": "hf_effi.selection.greso",
    "GainRL": "hf_effi.selection.gain_rl",
    "GroupReward": "hf_effi.selection.rewards",
    "HIVE": "hf_effi.selection.hive",
    "HybridGate": "hf_effi.selection.hybrid",
    "Knapsack": "hf_effi.selection.allocation",
    "LengthBand": "hf_effi.selection.filters",
    "MaxVariancePruner": "hf_effi.selection.pruners",
    "MilestoneReward": "hf_effi.selection.rewards",
    "MoPPS": "hf_effi.selection.mopps",
    "OBLRBaseline": "hf_effi.selection.advantages",
    "OPO": "hf_effi.selection.advantages",
    "OTB": "hf_effi.selection.advantages",
    "OfflineCurriculum": "hf_effi.selection.curriculum",
    "PCL": "hf_effi.selection.pcl",
    "PassRateBand": "hf_effi.functional.rollouts",
    "ProcessRewards": "hf_effi.selection.advantages",
    "RandomPruner": "hf_effi.selection.pruners",
    "ReinforceAdvantages": "hf_effi.selection.reinforce",
    "Screening": "hf_effi.selection.screening",
    "ShuffledPrompts": "hf_effi.functional.rollouts",
    "SideColumn": "hf_effi.selection.rewards",
    "SourceBands": "hf_effi.selection.filters",
    "VIP": "hf_effi.selection.allocation",
    "ZeroVariance": "hf_effi.selection.filters",
    "group_reward": "hf_effi.selection.rewards",
    "side_column": "hf_effi.selection.rewards",
    "split_probe": "hf_effi.selection.probe",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from ..functional.rollouts import AdvantagePruner as AdvantagePruner
    from ..functional.rollouts import PassRateBand as PassRateBand
    from ..functional.rollouts import ShuffledPrompts as ShuffledPrompts
    from .adarft import AdaRFT as AdaRFT
    from .advantages import OPO as OPO
    from .advantages import OTB as OTB
    from .advantages import DurationWeights as DurationWeights
    from .advantages import EntropicAdvantages as EntropicAdvantages
    from .advantages import OBLRBaseline as OBLRBaseline
    from .advantages import ProcessRewards as ProcessRewards
    from .allocation import VIP as VIP
    from .allocation import Knapsack as Knapsack
    from .curriculum import OfflineCurriculum as OfflineCurriculum
    from .discover import DiscoverPrompts as DiscoverPrompts
    from .dump import DUMP as DUMP
    from .filters import FilterChain as FilterChain
    from .filters import LengthBand as LengthBand
    from .filters import SourceBands as SourceBands
    from .filters import ZeroVariance as ZeroVariance
    from .gain_rl import GainRL as GainRL
    from .greso import GRESO as GRESO
    from .hive import HIVE as HIVE
    from .hybrid import HybridGate as HybridGate
    from .mopps import MoPPS as MoPPS
    from .pcl import PCL as PCL
    from .probe import split_probe as split_probe
    from .pruners import D3S as D3S
    from .pruners import FirstRowsPruner as FirstRowsPruner
    from .pruners import MaxVariancePruner as MaxVariancePruner
    from .pruners import RandomPruner as RandomPruner
    from .rates import BetaRates as BetaRates
    from .rates import EmbeddingRates as EmbeddingRates
    from .reinforce import ReinforceAdvantages as ReinforceAdvantages
    from .rewards import GroupReward as GroupReward
    from .rewards import MilestoneReward as MilestoneReward
    from .rewards import SideColumn as SideColumn
    from .rewards import group_reward as group_reward
    from .rewards import side_column as side_column
    from .screening import Screening as Screening
    from .stream import BufferedPrompts as BufferedPrompts

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
