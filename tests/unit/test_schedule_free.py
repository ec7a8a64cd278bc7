"""Which point an optimizer holds is asked of what it has, not of what it is called."""

import torch

from hf_effi.optim import holds_average, is_schedule_free


class Moves(torch.optim.SGD):
    """An optimizer with two points, under a name that says nothing."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["train_mode"] = True

    def train(self):
        for group in self.param_groups:
            group["train_mode"] = True

    def eval(self):
        for group in self.param_groups:
            group["train_mode"] = False


def test_two_points_are_found_whatever_the_class_is_called():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = Moves([weight])
    assert is_schedule_free(optimizer) and not holds_average(optimizer)
    optimizer.eval()
    assert holds_average(optimizer)


def test_a_name_is_not_enough_and_nothing_is_no_optimizer():
    named = type("AdamWScheduleFree", (torch.optim.SGD,), {})([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    assert not is_schedule_free(named) and holds_average(named)
    assert not is_schedule_free(None) and holds_average(None)
    assert not is_schedule_free(torch.nn.Linear(1, 1))  # has both methods, and no groups
