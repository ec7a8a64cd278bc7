"""Plans before a run, pages and plots after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._faces import face

#: public name -> module that defines it
_PUBLIC = {
    "MemoryPlan": "hf_effi.report.plan_memory",
    "RewardFinding": "hf_effi.report.reward_findings",
    "RewardReport": "hf_effi.report.reward_findings",
    "check_reward": "hf_effi.report.reward_check",
    "plot_range_test": "hf_effi.report.range_plot",
    "plot_schedules": "hf_effi.report.schedule_plot",
    "preview": "hf_effi.report.preview_order",
}

if TYPE_CHECKING:  # what editors, type checkers and the reference see of the lazy names
    from .plan_memory import MemoryPlan as MemoryPlan
    from .preview_order import preview as preview
    from .range_plot import plot_range_test as plot_range_test
    from .reward_check import check_reward as check_reward
    from .reward_findings import RewardFinding as RewardFinding
    from .reward_findings import RewardReport as RewardReport
    from .schedule_plot import plot_schedules as plot_schedules

__getattr__, __dir__, __all__ = face(__name__, _PUBLIC)
