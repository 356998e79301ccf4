"""Measure flatness: zeroth- and first-order flatness, eigenvalues, trace and spectral density of the Hessian.

>>> import torch
>>> from gam_fast import flatness
>>> model = torch.nn.Linear(2, 1)
>>> data = [(torch.randn(8, 2), torch.randn(8, 1)) for _ in range(3)]
>>> loss = flatness.Loss(model, torch.nn.MSELoss(), data)
>>> found = flatness.first_order_flatness(loss, rho=0.1)
>>> found.value >= flatness.zeroth_order_flatness(loss, rho=0.1).value
True

Flatness and slices need only torch. Curvature needs curvlinops and SciPy, pictures need matplotlib, and progress bars
need tqdm: the extra ``flatness``. ``python -m gam_fast.flatness --help`` measures a checkpoint.
"""

from .ascent import Flatness, first_order_flatness, zeroth_order_flatness
from .curvature import (
    Eigenvalues,
    SpectralDensity,
    Trace,
    hessian,
    hessian_eigenvalues,
    hessian_trace,
    spectral_density,
)
from .loss import Loss
from .measure import Measurement, measure
from .plots import plot_slice, plot_spectrum, plot_surface
from .slices import Slice, Surface, filter_normalised_direction, slice_1d, slice_2d

__all__ = [
    "Eigenvalues",
    "Flatness",
    "Loss",
    "Measurement",
    "Slice",
    "SpectralDensity",
    "Surface",
    "Trace",
    "filter_normalised_direction",
    "first_order_flatness",
    "hessian",
    "hessian_eigenvalues",
    "hessian_trace",
    "measure",
    "plot_slice",
    "plot_spectrum",
    "plot_surface",
    "slice_1d",
    "slice_2d",
    "spectral_density",
    "zeroth_order_flatness",
]
