"""Training confined to a fixed right subspace, as something any torch optimizer wears.

Two forms that plain SGD cannot tell apart and Adam can:

- of the gradient (the paper's): g <- g V V^T before the optimizer sees it. What the
  optimizer then makes of g may leave the subspace: Adam divides entry by entry, and
  weight decay pulls on the whole matrix.
- of the update: W <- W_old + (W_new - W_old) V V^T after the step. It stays inside,
  whatever the optimizer did, up to the rounding of the stored weights. Weights in 16
  bits would add up one rounding a step, so they are W = W_lock + C V^T, rounded from
  float32 coefficients C every time.

A parameter is a matrix (n_rows, n_cols), rows being outputs; one that is stored the
other way round is named as transposed; or a stack (n, n_rows, n_cols) with a basis for
each slice. A slice whose basis is zero is free.

Hooks are no part of a state_dict: attach them again to an optimizer that is rebuilt.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from opd_geometry.geometry.spectra import (
    ORTHONORMAL_TOLERANCE,
    check_rank,
    finite_matrix,
)


@dataclass(frozen=True)
class ProjectionHandle:
    """What project_gradients and project_updates return; remove() takes them off.

    Attributes:
        hooks: on the optimizer.
        locks: of weights in 16 bits, by parameter: W_lock and C (..., n_rows, k), of
            which the weights are made. To go on after a restart, hand them over.
    """

    hooks: tuple[RemovableHandle, ...]
    locks: dict[Tensor, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def remove(self) -> None:
        """Let the optimizer step freely again. A second call does nothing."""
        for hook in self.hooks:
            hook.remove()


def project(matrix: Tensor, v: Tensor) -> Tensor:
    """Rows of a matrix, projected onto the span of V.

    M V V^T

    Args:
        matrix: (..., n_rows, n_cols) float.
        v: (..., n_cols, k), orthonormal columns, of the same dtype.

    Returns:
        (..., n_rows, n_cols), in the units of the matrix, of rank at most k.

    Source: arXiv:2606.07082 Fig. 6 (rank-16 projected training).

    >>> project(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
    tensor([[3., 0.]])
    """
    return (matrix @ v) @ v.mT


def project_gradients(
    optimizer: Optimizer,
    bases: Mapping[Tensor, Tensor],
    transposed: Collection[Tensor] = (),
) -> ProjectionHandle:
    """Project gradients at every step, before the optimizer sees them.

    g <- g V V^T

    The gradient that has been accumulated, and clipped, by then is projected once.

    Args:
        optimizer: any torch optimizer, or Accelerate's wrapper of one.
        bases: parameter (..., n_rows, n_cols) -> V (..., n_cols, k) with orthonormal
            columns, any float dtype. Parameters without an entry train freely.
        transposed: those of them that are stored as (..., n_cols, n_rows).

    Returns:
        Handle whose remove() ends the projection.

    Raises:
        ValueError: no bases, a parameter that is no matrix or not the optimizer's, a V
            that does not fit it; at the step: a closure, which would compute gradients
            that the projection never sees.

    Source: arXiv:2606.07082 Fig. 6. With Adam the update leaves the subspace in part;
        leaked_energy says by how much.
    """
    inner = _unwrapped(optimizer)
    ready = _ready_bases(inner, bases, transposed)

    def before_step(_: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        if any(callable(a) for a in (*args[1:], *kwargs.values())):
            raise ValueError(
                "optimizer.step was given a closure: expected gradients to be ready; "
                "call backward first, or use project_updates"
            )
        for parameter, basis in ready.items():
            if parameter.grad is not None:
                grad = basis.oriented(parameter.grad)
                grad.copy_(basis.inside(grad.to(basis.v.dtype)))

    return ProjectionHandle(
        (inner.register_step_pre_hook(torch.no_grad()(before_step)),)
    )


def project_updates(
    optimizer: Optimizer,
    bases: Mapping[Tensor, Tensor],
    transposed: Collection[Tensor] = (),
    locks: Mapping[Tensor, tuple[Tensor, Tensor]] | None = None,
) -> ProjectionHandle:
    """Project the change that every step makes to the weights, weight decay included.

    W_new <- W_old + (W_new - W_old) V V^T, in 16 bits
    C <- C + (W_new - W_old) V, W_new <- round(W_lock + C V^T)

    Between the two hooks of a step one copy of the projected weights is held; of
    weights in 16 bits W_lock as well.

    Args:
        optimizer: any torch optimizer, or Accelerate's wrapper of one.
        bases, transposed: as for project_gradients.
        locks: W_lock and C of an earlier handle, for weights in 16 bits; where there
            is none the weights are W_lock as they are now.

    Returns:
        Handle whose remove() ends the projection.

    Raises:
        ValueError: no bases, a parameter that is no matrix or not the optimizer's, a V
            that does not fit it.

    Source: a control of this project; the paper projects gradients only.
    """
    inner = _unwrapped(optimizer)
    ready = _ready_bases(inner, bases, transposed)
    held = {
        p: _lock(p, basis, (locks or {}).get(p))
        for p, basis in ready.items()
        if p.dtype.itemsize < 4
    }
    w_before: dict[Tensor, Tensor] = {}
    inside_of = 0  # how many steps: one that calls its parent's is hooked twice

    def before_step(_: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        nonlocal inside_of
        inside_of += 1
        if not w_before:
            w_before.update((p, p.detach().clone()) for p in ready)

    def after_step(_: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        nonlocal inside_of
        inside_of -= 1
        for parameter, basis in ready.items():
            w = basis.oriented(parameter)
            copy = w_before[parameter]
            start = basis.oriented(copy).to(basis.v.dtype)
            delta = w.to(basis.v.dtype) - start
            if parameter in held:
                w.copy_(_from_lock(basis, w, delta, *held[parameter]))
            else:
                w.copy_(start + basis.inside(delta))
            if inside_of > 0:  # the outer step goes on from here
                copy.copy_(parameter)
            else:
                del w_before[parameter]

    return ProjectionHandle(
        (
            inner.register_step_pre_hook(torch.no_grad()(before_step)),
            inner.register_step_post_hook(torch.no_grad()(after_step)),
        ),
        held,
    )


@dataclass
class _Basis:
    """V beside its parameter, in float32 or better."""

    v: Tensor
    transposed: bool
    free: Tensor | None  # (n, 1, 1): which slices of a stack have no basis

    def oriented(self, tensor: Tensor) -> Tensor:
        """The parameter, or its gradient, with outputs as rows."""
        if self.v.device != tensor.device:  # the model may have moved since
            self.v = self.v.to(tensor.device)
            self.free = None if self.free is None else self.free.to(tensor.device)
        return tensor.mT if self.transposed else tensor

    def inside(self, change: Tensor) -> Tensor:
        """What of a change stays."""
        kept = project(change, self.v)
        return kept if self.free is None else torch.where(self.free, change, kept)


def _lock(
    parameter: Tensor, basis: _Basis, earlier: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """W_lock, stored as the parameter is, and coefficients, zero at the lock."""
    n_rows = basis.oriented(parameter.detach()).shape[:-1]
    zeros = torch.zeros(
        (*n_rows, basis.v.shape[-1]), dtype=basis.v.dtype, device=parameter.device
    )
    if earlier is None:
        return parameter.detach().clone(), zeros
    return (
        torch.empty_like(parameter).copy_(earlier[0]).detach(),
        zeros.copy_(earlier[1]),
    )


def _from_lock(
    basis: _Basis, w: Tensor, delta: Tensor, w_lock: Tensor, coefficients: Tensor
) -> Tensor:
    """W_lock + C V^T after a change of the weights, in the basis' dtype."""
    coefficients += delta @ basis.v
    lock = basis.oriented(w_lock).to(basis.v.dtype)
    inside = lock + coefficients @ basis.v.mT
    if basis.free is None:
        return inside
    return torch.where(basis.free, w.to(basis.v.dtype), inside)


def leaked_energy(delta: Tensor, v: Tensor) -> float:
    """Share of an update's energy that lies outside a right subspace.

    ||dW - dW V V^T||_F^2 / ||dW||_F^2

    Args:
        delta: (n_rows, n_cols), any float dtype; computed in float64. Or a stack of
            such, (n, n_rows, n_cols), whose energies are added up.
        v: (n_cols, k), orthonormal columns; of a stack (n, n_cols, k).

    Returns:
        Share in [0, 1]; about 1 - k / n_cols when V has nothing to do with delta.

    Raises:
        ValueError: NaN or inf, a zero update, a V that does not fit.

    Source: the complement of the energy share in arXiv:2606.13657.

    >>> leaked_energy(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
    0.64
    """
    if delta.ndim == 3 and v.ndim == 3 and len(delta) == len(v):
        slices = [finite_matrix(one, "delta") for one in delta]
        bases = [_orthonormal_basis(one, delta.shape[2]) for one in v]
        change, basis = torch.stack(slices), torch.stack(bases)
    else:
        change = finite_matrix(delta, "delta")
        basis = _orthonormal_basis(v, change.shape[1])
    # Scaled first: the squares of tiny updates would underflow.
    largest = change.abs().max()
    if largest == 0:
        raise ValueError(
            "delta is zero: expected an update with energy to share; compare two "
            "different checkpoints"
        )
    change = change / largest
    outside = change - project(change, basis)
    return float(outside.square().sum() / change.square().sum())


def random_subspace(n: int, k: int, generator: torch.Generator) -> Tensor:
    """Orthonormal basis of a uniformly drawn k-dimensional subspace of R^n.

    V = Q of G = Q R, with G (n, k) Gaussian

    Args:
        n: dimension of the space, the number of columns of the weight matrix.
        k: dimension of the subspace, 1 <= k <= n.
        generator: source of the draw, on the CPU.

    Returns:
        v (n, k), float64.

    Raises:
        ValueError: k outside 1 .. n.

    Source: a control of this project: the paper shows no other subspace than its own.

    >>> v = random_subspace(5, 2, torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(v.T @ v, torch.eye(2, dtype=torch.float64)))
    True
    """
    check_rank(k, (n,))
    gaussian = torch.randn(n, k, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q


def _unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer inside a wrapper (Accelerate's runs no hooks itself)."""
    return getattr(optimizer, "optimizer", optimizer)


def _ready_bases(
    optimizer: Optimizer,
    bases: Mapping[Tensor, Tensor],
    transposed: Collection[Tensor],
) -> dict[Tensor, _Basis]:
    """Bases checked and moved to their parameters, in float32 or better."""
    if not bases:
        raise ValueError("bases are empty: expected a basis for at least one parameter")
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    turned = {id(p) for p in transposed}
    ready = {}
    for parameter, v in bases.items():
        if parameter.ndim not in (2, 3) or parameter not in owned:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)}, "
                f"{'' if parameter in owned else 'not '}the optimizer's: expected a "
                "matrix that it steps; give bases for its 2-D weights and stacks only"
            )
        is_turned = id(parameter) in turned
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        basis, free = _checked(parameter.mT if is_turned else parameter, v)
        ready[parameter] = _Basis(basis.to(parameter.device, dtype), is_turned, free)
    return ready


def _checked(parameter: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Float64 basis, and which slices of a stack are free."""
    if parameter.ndim == 2:
        return _orthonormal_basis(v, parameter.shape[1]), None
    if v.ndim != 3 or len(v) != len(parameter):
        raise ValueError(
            f"v of shape {tuple(v.shape)} for a stack of {tuple(parameter.shape)}: "
            "expected one basis a slice, (n, n_cols, k)"
        )
    free = ~v.bool().flatten(1).any(1)
    basis = torch.stack(
        [
            one.double() if is_free else _orthonormal_basis(one, parameter.shape[2])
            for one, is_free in zip(v.cpu(), free.cpu(), strict=True)
        ]
    )
    return basis, free[:, None, None].to(parameter.device) if free.any() else None


def _orthonormal_basis(v: Tensor, n_cols: int) -> Tensor:
    """Float64 basis of the span of V, orthonormal to rounding, or a clear error."""
    basis = finite_matrix(v, "v")
    if basis.shape[0] != n_cols:
        raise ValueError(
            f"v has shape {tuple(v.shape)}: expected {n_cols} rows, one for each "
            "column of the weight matrix; pass right singular vectors (vh.mT[:, :k])"
        )
    k = basis.shape[1]
    gram_error = (basis.mT @ basis - torch.eye(k, dtype=basis.dtype)).abs().max()
    if gram_error > ORTHONORMAL_TOLERANCE:
        raise ValueError(
            f"v of shape {tuple(v.shape)} is off orthonormal columns by "
            f"{float(gram_error):.1e}: expected {ORTHONORMAL_TOLERANCE:.0e} at most; "
            "orthonormalise it with torch.linalg.qr"
        )
    # A stored basis is orthonormal to its rounding only; its span is what counts.
    return torch.linalg.qr(basis).Q
