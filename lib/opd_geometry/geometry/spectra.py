"""Spectra and subspaces of one weight matrix: tensors in, numbers out, in float64.

Everything runs on the CPU: an SVD on an accelerator can be unstable when the two
matrices are nearly identical, which is the case that matters here.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# How far from orthonormal a basis may be: float32 storage leaves about 1e-6,
# handing over the wrong matrix (vh for v, an unnormalised basis) about 1.
ORTHONORMAL_TOLERANCE = 1e-4
# Below this a basis is used as it is: its angles are off by less than 1e-9 degrees.
ORTHONORMAL_ALREADY = 1e-11


def finite_float64(tensor: Tensor, name: str) -> Tensor:
    """Values of a floating-point tensor in float64 on the CPU, refused unless finite.

    Args:
        tensor: any shape, any floating dtype, any device.
        name: what the error message calls it.

    Returns:
        The same values, detached; the tensor itself if it is one already.

    Raises:
        ValueError: not floating point, empty, or NaN or inf inside (counted).
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(
            f"{name} is {kind}, expected a floating-point tensor; "
            "dequantise or convert it first"
        )
    if tensor.numel() == 0:
        raise ValueError(
            f"{name} is empty (shape {tuple(tensor.shape)}), "
            "expected at least one entry; leave it out"
        )
    values = tensor.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(values).all()):
        n_nan = int(torch.isnan(values).sum())
        n_inf = int(torch.isinf(values).sum())
        raise ValueError(
            f"{name} holds {n_nan} NaN and {n_inf} inf in {values.numel()} entries, "
            "expected finite values; leave this matrix out or repair the checkpoint"
        )
    return values


def finite_matrix(w: Tensor, name: str) -> Tensor:
    """`finite_float64` of a tensor that must have two dimensions.

    Raises:
        ValueError: as `finite_float64`, or not two-dimensional.
    """
    if isinstance(w, Tensor) and w.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(w.shape)}, expected two dimensions; "
            "pass one matrix at a time"
        )
    return finite_float64(w, name)


def check_rank(k: int, shape: Sequence[int], name: str = "k") -> None:
    """Refuse a subspace dimension outside 1 .. min(shape).

    Raises:
        ValueError: `k` is no integer or out of range.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= min(shape):
        raise ValueError(
            f"{name} = {k!r} for a matrix of shape {tuple(shape)}, "
            f"expected an integer from 1 to {min(shape)}; lower {name}"
        )


def default_rank(shape: Sequence[int], divisor: int) -> int:
    """Subspace dimension that scales with the matrix.

    k = max(1, floor(min(shape) / divisor)): divisor 8 is the paper's k = 512 at
    width 4096, divisor 64 its r = 64.

    Args:
        shape: (n_rows, n_cols).
        divisor: at least 1.

    Returns:
        k, from 1 to min(shape).

    Raises:
        ValueError: a side or the divisor is smaller than 1.

    Source: arXiv:2606.07082 Fig. 2 and 3 (k = 512, r = 64 at width 4096).

    >>> default_rank((4096, 12288), 8), default_rank((4096, 1024), 64)
    (512, 16)
    """
    if divisor < 1 or min(shape) < 1:
        raise ValueError(
            f"shape {tuple(shape)} with divisor {divisor}, "
            "expected sides and divisor of at least 1"
        )
    return max(1, min(shape) // divisor)


def svd(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition in float64.

    w = u diag(s) vh

    Args:
        w: (n_rows, n_cols), any floating dtype.

    Returns:
        u (n_rows, m), s (m,) descending and vh (m, n_cols), m = min(w.shape).

    Raises:
        ValueError: not a finite floating-point matrix.

    Source: arXiv:2606.07082, diagnostics (float64, on the CPU).
    """
    u, s, vh = torch.linalg.svd(finite_matrix(w, "w"), full_matrices=False)
    return u, s, vh


def singular_values(w: Tensor) -> Tensor:
    """Singular values in float64, descending.

    Args:
        w: (n_rows, n_cols), any floating dtype.

    Returns:
        s (min(w.shape),), in the unit of w, at least 0.

    Raises:
        ValueError: not a finite floating-point matrix.

    >>> singular_values(torch.tensor([[0.0, 3.0], [4.0, 0.0]])).tolist()
    [4.0, 3.0]
    """
    return torch.linalg.svdvals(finite_matrix(w, "w"))


def _orthonormal(basis: Tensor, name: str) -> Tensor:
    """Float64 basis of the same column space, orthonormal to rounding."""
    columns = finite_matrix(basis, name)
    n_rows, k = columns.shape
    gram_error = (columns.T @ columns - torch.eye(k, dtype=torch.float64)).abs().max()
    if k > n_rows or float(gram_error) > ORTHONORMAL_TOLERANCE:
        raise ValueError(
            f"{name} (shape {n_rows} x {k}) is off orthonormal columns by "
            f"{float(gram_error):.1e}, expected at most {ORTHONORMAL_TOLERANCE:.0e}; "
            "pass u[:, :k] or vh[:k].T of an SVD"
        )
    if float(gram_error) < ORTHONORMAL_ALREADY:
        return columns
    # A basis that was stored in float32 is orthonormal to 1e-7 only, which would
    # be read as an angle of 1e-5 degrees.
    return torch.linalg.qr(columns).Q


def check_same_shape(a: Tensor, b: Tensor, names: tuple[str, str]) -> None:
    """Refuse two tensors of different shapes, naming both.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"{names[0]} has shape {tuple(a.shape)} and {names[1]} {tuple(b.shape)}, "
            "expected the same shape; compare matching matrices"
        )


def _check_determined(s: Tensor, k: int, shape: Sequence[int], name: str) -> None:
    """Refuse a top-k subspace that reaches into the null space."""
    if float(s[0]) == 0.0:
        raise ValueError(
            f"{name} is zero, expected a non-zero matrix: "
            "it has no top subspace; leave it out"
        )
    floor = float(s[0]) * max(shape) * torch.finfo(torch.float64).eps
    rank = int((s > floor).sum())
    if rank < k:
        raise ValueError(
            f"{name} has numerical rank {rank}, expected at least k = {k}: its top-{k} "
            f"subspace is undetermined; use k <= {rank}"
        )


def _residual_sines(residual: Tensor) -> Tensor:
    """Singular values of a tall (n, k) matrix, ascending.

    Squares are three times as fast, and exact to 1e-9 while none of them falls below
    1e-6 of the largest.
    """
    squares = torch.linalg.eigvalsh(residual.T @ residual)
    if float(squares[0]) > 1e-6 * float(squares[-1]):
        return squares.sqrt()
    return torch.linalg.svdvals(residual).flip(0)


def principal_angles_deg(basis_a: Tensor, basis_b: Tensor) -> Tensor:
    """Principal angles between two subspaces of the same dimension.

    cos theta_i = sigma_i(A^T B), sin theta_i = sigma_{k+1-i}((I - A A^T) B),
    theta_i = atan2(sin theta_i, cos theta_i)

    The cosine alone loses angles below 1e-8 rad and the sine alone those near 90
    degrees; their atan2 keeps full relative accuracy over the whole range.

    Args:
        basis_a: (n, k) with orthonormal columns.
        basis_b: (n, k) with orthonormal columns.

    Returns:
        theta (k,), ascending, in degrees, from 0 to 90.

    Raises:
        ValueError: shapes differ, columns not orthonormal, NaN or inf.

    Source: arXiv:2606.07082 Fig. 2 (there by cosines alone).

    >>> a = torch.eye(3, 1)
    >>> b = torch.tensor([[3.0], [4.0], [0.0]]) / 5
    >>> round(principal_angles_deg(a, b).item(), 4)
    53.1301
    """
    check_same_shape(basis_a, basis_b, ("basis_a", "basis_b"))
    return angles_between_deg(
        _orthonormal(basis_a, "basis_a"), _orthonormal(basis_b, "basis_b")
    )


def angles_between_deg(a: Tensor, b: Tensor) -> Tensor:
    """`principal_angles_deg` of bases that are known to be orthonormal.

    Args:
        a: (n, k) float64, orthonormal to 1e-11.
        b: (n, k) float64, the same.
    """
    overlap = a.T @ b
    sines = _residual_sines(b - a @ overlap)
    if float(sines[-1]) < 0.5:  # far from where the sine alone loses accuracy
        return torch.rad2deg(torch.asin(sines))
    return torch.rad2deg(torch.atan2(sines, torch.linalg.svdvals(overlap)))


def subspace_angles_deg(
    w_before: Tensor, w_after: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Rotation of the top-k left and right singular subspaces.

    left: angles between U_before[:, :k] and U_after[:, :k]; right: the same of V

    Args:
        w_before: (n_rows, n_cols), any floating dtype.
        w_after: (n_rows, n_cols).
        k: from 1 to min(shape); `default_rank(shape, 8)` scales as the paper.

    Returns:
        left (k,) and right (k,), ascending, in degrees, from 0 to 90. Identical
        matrices give exactly 0.

    Raises:
        ValueError: shapes differ, NaN or inf, k out of range, or a matrix whose
            numerical rank is below k.

    Source: arXiv:2606.07082 Fig. 2.
    """
    before = finite_matrix(w_before, "w_before")
    after = finite_matrix(w_after, "w_after")
    check_same_shape(before, after, ("w_before", "w_after"))
    check_rank(k, before.shape)
    u_before, s_before, vh_before = svd(before)
    _check_determined(s_before, k, before.shape, "w_before")
    if torch.equal(before, after):
        # Two runs of LAPACK on equal input may differ in the last bit, which a
        # small gap at k would blow up.
        zeros = torch.zeros(k, dtype=torch.float64)
        return zeros, zeros.clone()
    u_after, s_after, vh_after = svd(after)
    _check_determined(s_after, k, after.shape, "w_after")
    left = principal_angles_deg(u_before[:, :k], u_after[:, :k])
    right = principal_angles_deg(vh_before[:k].T, vh_after[:k].T)
    return left, right


def _spectrum(s: Tensor, name: str) -> Tensor:
    """Checked spectrum in float64, descending."""
    values = finite_float64(s, name)
    if values.ndim != 1 or bool((values < 0).any()):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} and minimum "
            f"{float(values.min()):.3g}, expected a vector of singular values; "
            "pass singular_values(w)"
        )
    return values.sort(descending=True).values


def normalised_spectral_shift(s_before: Tensor, s_after: Tensor) -> float:
    """Relative change of the spectrum (NSS).

    NSS = ||s_after - s_before||_2 / ||s_before||_2, both in descending order

    Args:
        s_before: (m,) singular values.
        s_after: (m,) singular values.

    Returns:
        NSS, without unit, at least 0.

    Raises:
        ValueError: lengths differ, NaN or inf, a negative value, or s_before zero.

    Source: arXiv:2606.07082 Fig. 2.

    >>> normalised_spectral_shift(torch.tensor([4.0, 3.0]), torch.tensor([7.0, 7.0]))
    1.0
    """
    before = _spectrum(s_before, "s_before")
    after = _spectrum(s_after, "s_after")
    check_same_shape(before, after, ("s_before", "s_after"))
    if float(before[0]) == 0.0:
        raise ValueError(
            "s_before is zero, expected a non-zero spectrum: "
            "the shift has nothing to be relative to; leave this matrix out"
        )
    scale = before[0]  # keeps the squares of very small or large weights in range
    return float(
        torch.linalg.vector_norm((after - before) / scale)
        / torch.linalg.vector_norm(before / scale)
    )


def wedin_bound_deg(s_before: Tensor, s_after: Tensor, norm: float, k: int) -> float:
    """How far an update of that spectral norm can turn the top-k subspaces (Gate II).

    sin theta <= ||delta||_2 / (s_after_k - s_before_{k+1})

    The paper writes the gap of W_0 alone, s_before_k - s_before_{k+1}, which is no
    bound once the update is as large as the gap; this is Wedin's.

    Args:
        s_before: (m,) singular values of W_0, descending.
        s_after: (m,) singular values of W_+, descending.
        norm: spectral norm of the update.
        k: from 1 to m; at m there is nothing left to turn towards within the spectrum,
            and s_before_{m+1} counts as 0.

    Returns:
        Degrees in [0, 90]; 90 where the gap is no larger than the update.

    Raises:
        ValueError: lengths differ, NaN or inf, or k outside 1 to m.

    Source: arXiv:2606.07082, the three-gate account; Wedin (1972).

    >>> s = torch.tensor([3.0, 1.0])
    >>> round(wedin_bound_deg(s, s, norm=1.0, k=1), 3)
    30.0
    """
    before, after = _spectrum(s_before, "s_before"), _spectrum(s_after, "s_after")
    check_same_shape(before, after, ("s_before", "s_after"))
    check_rank(k, before.shape)
    below = float(before[k]) if k < len(before) else 0.0
    gap = float(after[k - 1]) - below
    return 90.0 if gap <= norm else math.degrees(math.asin(norm / gap))


def mirsky_bound(s_before: Tensor, norm: float) -> float:
    """The largest spectral shift that an update of that Frobenius norm can cause.

    NSS <= ||delta||_F / ||s_before||_2

    Args:
        s_before: (m,) singular values of W_0.
        norm: Frobenius norm of the update, which is Gate I's to bound.

    Returns:
        Upper bound of `normalised_spectral_shift`, without unit.

    Raises:
        ValueError: NaN or inf, a negative value, or s_before zero.

    Source: arXiv:2606.07082, the three-gate account; Mirsky (1960).

    >>> mirsky_bound(torch.tensor([4.0, 3.0]), norm=1.0)
    0.2
    """
    before = _spectrum(s_before, "s_before")
    size = float(torch.linalg.vector_norm(before))
    if size == 0.0:
        raise ValueError("s_before is zero, expected a non-zero spectrum; leave it out")
    return norm / size


def anchor_bound(divergence: float, curvature: float) -> float:
    """How far weights can move while their output distribution stays near (Gate I).

    ||delta||_F <= sqrt(2 divergence / curvature)

    Args:
        divergence: largest divergence from the anchor's distribution, in nats.
        curvature: smallest curvature of that divergence in the weights, above 0.

    Returns:
        Upper bound of the Frobenius norm, in units of the weights.

    Raises:
        ValueError: a negative divergence, or a curvature that is not above 0.

    Source: arXiv:2606.07082, the three-gate account.

    >>> anchor_bound(divergence=0.02, curvature=4.0)
    0.1
    """
    if not (divergence >= 0.0 and curvature > 0.0):
        raise ValueError(
            f"divergence {divergence!r} and curvature {curvature!r}: expected at least "
            "0 and above 0; estimate both at the anchor"
        )
    return math.sqrt(2.0 * divergence / curvature)


def spectrum_stable_rank(s: Tensor) -> float:
    """Stable rank from singular values that are at hand already.

    sum_i s_i^2 / max_i s_i^2

    Args:
        s: (m,) singular values of the update.

    Returns:
        Stable rank, without unit, from 1 to m.

    Raises:
        ValueError: NaN or inf, a negative value, or all zero.

    Source: arXiv:2606.07082 Fig. 4a.
    """
    values = _spectrum(s, "s")
    if float(values[0]) == 0.0:
        raise ValueError(
            "the update is zero, expected a non-zero matrix: "
            "its stable rank is undefined; leave it out"
        )
    return float((values / values[0]).square().sum())


def stable_rank(delta: Tensor) -> float:
    """Stable rank of an update.

    ||delta||_F^2 / ||delta||_2^2

    Args:
        delta: (n_rows, n_cols), w_after - w_before.

    Returns:
        Stable rank, without unit, from 1 to min(delta.shape). A Gaussian n x n
        matrix has about n / 4.

    Raises:
        ValueError: NaN or inf, not a matrix, or zero.

    Source: arXiv:2606.07082 Fig. 4a.

    >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
    1.5
    """
    return spectrum_stable_rank(torch.linalg.svdvals(finite_matrix(delta, "delta")))


def frobenius_norm(delta: Tensor) -> float:
    """Frobenius norm of an update.

    sqrt(sum_ij delta_ij^2)

    Args:
        delta: any shape.

    Returns:
        The norm in the unit of the weights, at least 0 (0 for a zero update).

    Raises:
        ValueError: NaN or inf, or no entry.

    Source: arXiv:2606.07082 Fig. 4b.

    >>> frobenius_norm(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    5.0
    """
    return float(torch.linalg.vector_norm(finite_float64(delta, "delta")))


def hill_exponent(s: Tensor, k: int) -> float:
    """Hill estimate of the tail exponent over the top k singular values.

    [ 1 / (k - 1) * sum_{i < k} log(s_i / s_k) ]^-1

    The paper does not state k, and the estimate depends on it: show a sweep.

    Args:
        s: (m,) singular values of the update.
        k: from 2 to m.

    Returns:
        The exponent, without unit, above 0; smaller means a heavier tail.

    Raises:
        ValueError: k out of range, NaN or inf, s_k zero up to rounding, or
            s_1 = ... = s_k, whose exponent is infinite.

    Source: arXiv:2606.07082 Fig. 4c.

    >>> round(hill_exponent(torch.tensor([4.0, 2.0, 1.0]), 3), 4)
    0.9618
    """
    values = _spectrum(s, "s")
    if isinstance(k, bool) or not isinstance(k, int) or not 2 <= k <= len(values):
        raise ValueError(
            f"k = {k!r} for {len(values)} singular values, "
            f"expected an integer from 2 to {len(values)}; lower k"
        )
    rounding = len(values) * torch.finfo(torch.float64).eps
    rank = int((values > rounding * values[0]).sum())
    if rank < k:
        raise ValueError(
            f"only {rank} singular values are above rounding, expected at least "
            f"k = {k}; use k <= {rank} or leave a zero update out"
        )
    log_ratio_sum = float((values[: k - 1] / values[k - 1]).log().sum())
    if log_ratio_sum <= k * rounding:
        raise ValueError(
            f"the top {k} singular values are equal, expected a decay: "
            "the Hill exponent is infinite; use a larger k"
        )
    return (k - 1) / log_ratio_sum


def top_right_subspace(delta: Tensor, k: int) -> Tensor:
    """Basis of the top-k right singular subspace of an update.

    V_k = first k columns of V, delta = U S V^T

    Args:
        delta: (n_rows, n_cols), w_after - w_before.
        k: from 1 to the numerical rank of delta.

    Returns:
        v (n_cols, k), float64, orthonormal columns; their signs are arbitrary.

    Raises:
        ValueError: NaN or inf, zero, k out of range or above the numerical rank.

    Source: arXiv:2606.07082 Fig. 5 (K = 16).
    """
    matrix = finite_matrix(delta, "delta")
    check_rank(k, matrix.shape)
    _, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    _check_determined(s, k, matrix.shape, "delta")
    return vh[:k].T.contiguous()


def subspace_similarity(v_a: Tensor, v_b: Tensor) -> float:
    """Similarity of two K-dimensional subspaces (Sim_K).

    Sim_K = (1 / K) ||V_a^T V_b||_F^2, the mean squared cosine of their angles

    Args:
        v_a: (n, K) with orthonormal columns.
        v_b: (n, K) with orthonormal columns.

    Returns:
        Sim_K, without unit, from 0 (orthogonal) to 1 (equal). Random subspaces
        give K / n on average.

    Raises:
        ValueError: shapes differ, columns not orthonormal, NaN or inf.

    Source: arXiv:2606.07082 Fig. 5.

    >>> subspace_similarity(torch.eye(4, 2), torch.eye(4)[:, 1:3])
    0.5
    """
    check_same_shape(v_a, v_b, ("v_a", "v_b"))
    overlap = _orthonormal(v_a, "v_a").T @ _orthonormal(v_b, "v_b")
    return min(1.0, float(overlap.square().sum()) / overlap.shape[0])
