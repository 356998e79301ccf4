"""A short table of the engine's tests on the backends that it is not proved on in full: methods × forms, one row each.

On eager, on the CUDA core in the emulator and, by `make interpret`, on the Triton kernels. What these compute is proved
by the tests of primitives (test_backends.py, test_cuda.py, test_interpreted.py); here, that the engine asks for it.
"""

from __future__ import annotations

from itertools import product

import pytest
import test_accumulation
import test_active
import test_amp
import test_chain
import test_engine
import test_exact
import test_forward_writes
import test_hooks
import test_leaving
import test_radius
import test_random
import test_restore
import test_share
import test_subsets
import test_trajectories
import test_updates
import test_weight_caches
import torch
from cases import ALL, BASES, DTYPES, METHODS, in_turn

SGD, RMSPROP = torch.optim.SGD, torch.optim.RMSprop
EACH = list(METHODS)
MIXED = in_turn(EACH, DTYPES)
NAN, INF = float("nan"), float("inf")

TABLE = {
    test_trajectories.test_agrees_with_the_plain_loops_in_fp64: [
        (("mlp", "partly_used")[i % 2], method, base)
        for i, (method, base) in enumerate(product(ALL, ["sgd_nesterov", "adamw", "rmsprop"]))
    ],
    test_trajectories.test_groups_may_differ_in_every_hyper_parameter: [("gam",)],
    test_trajectories.test_one_step_in_low_precision_stays_within_the_derived_bound: [
        *MIXED,
        *(("gam", dtype) for dtype in DTYPES),
    ],
    test_exact.test_trajectories_are_those_of_torch_func: [
        ("mlp", "exact", "sgd"),
        ("partly_used", "exact_sam", "rmsprop"),
    ],
    test_share.test_a_step_is_that_of_a_plain_loop_over_the_same_rows: [
        ("mlp", "sam", "sgd_nesterov", 0.25),
        ("partly_used", "gam", "adamw_maximize", 0.5),
    ],
    test_share.test_exact_gam_differentiates_the_loss_of_the_same_rows: [(0.1, 0.25)],
    test_subsets.test_agrees_with_the_plain_loops_in_fp64: [
        (model, method, base, "matrices") for method, model, base in in_turn(EACH[1:], ["mlp", "partly_used"], BASES)
    ],
    test_subsets.test_each_layer_has_a_norm_of_its_own: [
        ("mlp", "gam", "sgd_nesterov"),
        ("batchnorm_cnn", "friendly", "adamw"),
    ],
    test_subsets.test_the_norm_of_the_only_group_is_that_of_all: [(1,), (2,)],
    test_subsets.test_a_radius_that_is_capped: [("global",), ("group",)],
    test_restore.test_two_hundred_steps_with_lr_zero_change_no_bit: MIXED,
    test_restore.test_a_step_that_is_left_leaves_no_trace_and_the_next_one_works: [
        ("gam", 2, "break"),
        ("gam", 1, "keyboard"),
        ("gam", 3, "after_backward"),
        ("sam", 1, "closure"),
    ],
    test_restore.test_a_gradient_that_is_not_finite_undoes_the_step: [
        ("gam", 0, SGD, NAN),
        ("gam", 2, RMSPROP, NAN),
        ("sam", 1, torch.optim.AdamW, INF),
        ("base", 0, SGD, INF),
    ],
    test_restore.test_skip_counts_the_step_and_goes_on: [("gam", 3), ("sam", 0)],
    test_restore.test_ignore_lets_a_nan_through_as_torch_does: [()],
    test_restore.test_an_error_in_the_base_optimizer_restores_the_parameters: [()],
    test_restore.test_results_do_not_depend_on_the_number_of_threads: [
        ("gam", torch.bfloat16, 7),
        ("sam", torch.float32, 2),
    ],
    test_leaving.test_an_exception_handler_sees_the_parameters_as_they_were: [("gam", 2, KeyboardInterrupt)],
    test_engine.test_late_and_vanishing_gradients_count_as_zero: [()],
    test_forward_writes.test_lazy_modules: [("gam",), ("base",)],
    test_engine.test_parameters_on_two_devices_share_one_norm: [("gam", False), ("gam", True)],
    test_engine.test_copies_go_on_alike: [("gam", "deepcopy", "model"), ("sam", "pickle", "optimizer")],
    test_engine.test_a_model_may_be_converted_after_a_step: [()],
    test_updates.test_clipping_scales_the_final_direction: [
        ("gam", SGD, 2, 0.5),
        ("sam", test_updates.TorchsOwn, 1, 0.5),
    ],
    test_accumulation.test_micro_batches_take_the_step_of_the_large_batch: [("gam", "iterator")],
    test_active.test_every_third_step_and_the_base_between: [("gam",)],
    test_active.test_steep_steps_take_the_recipe_and_others_the_base: [("gam", 0.25)],
    test_radius.test_steps_are_those_with_the_numbers_it_chooses: [("gam", 1.0)],
    test_amp.test_the_trajectory_is_that_without_a_scaler: [
        ("gam", SGD, "turn"),
        ("sam", RMSPROP, "closure"),
        ("gam", torch.optim.AdamW, "scaler"),
    ],
    test_amp.test_overflow_in_any_pass_undoes_the_step_and_lowers_the_scale: [
        ("gam", 1, "skip", "scale"),
        ("gam", 3, "raise", "turn"),
        ("base", 0, "ignore", "closure"),
    ],
}


AROUND = {
    test_forward_writes.test_buffers_move_once_a_step_and_all_passes_see_the_same: in_turn(
        EACH, test_forward_writes.KINDS
    ),
    test_forward_writes.test_parameters_that_are_not_trained_move_once_a_step: in_turn(
        EACH, test_forward_writes.ENCODERS
    ),
    test_forward_writes.test_a_forward_that_writes_to_trained_parameters: in_turn(EACH, test_forward_writes.WRITERS),
    test_leaving.test_every_kind_of_loop_takes_the_same_step: in_turn(EACH),
    test_chain.test_the_trajectory_is_that_of_the_plain_loop: in_turn(EACH, test_chain.PAIRS),
    test_hooks.test_a_pre_hook_works_on_the_final_direction: in_turn(EACH, test_hooks.BASES),
    test_random.test_named_generators_draw_the_same_in_each_pass_and_go_on_as_after_one: in_turn(EACH, test_random.OWN),
    test_weight_caches.test_the_cache_serves_one_pass: in_turn(
        EACH, ["passes", "closure"], [test_weight_caches.Squared]
    ),
}
"""The surroundings of a step, for every method, on eager, whose lists are plain ones; kernels do not matter."""


def name_of(value):
    return value.__name__ if callable(value) else str(value)


def rows_of(table):
    return [
        pytest.param(test, row, id="-".join([test.__name__.removeprefix("test_"), *map(name_of, row)]))
        for test, rows in table.items()
        for row in rows
    ]


@pytest.mark.usefixtures("_on_the_others")
@pytest.mark.parametrize(("test", "row"), rows_of(TABLE))
def test_here_too(test, row):
    test(*row)


@pytest.mark.parametrize(("test", "row"), rows_of(AROUND))
def test_around_a_step_on_eager(test, row, monkeypatch):
    monkeypatch.setenv("GAM_FAST_BACKEND", "eager")
    test(*row)
