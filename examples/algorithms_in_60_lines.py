"""Algorithms 1 and 2 of PowerSGD+ for N workers in plain torch, each line beside the
paper's.

    python examples/algorithms_in_60_lines.py

This page is for a reader of the paper. One process plays all N workers, so an
all-reduce is `mean`, and nothing of `lowrank_comm` is imported: a test trains the same
problem with the library and compares the weights, the bases and the error memories.
Superscripts (i) of the paper are lists over the workers here.

Source: PowerSGD+ (Xie, Chen, Yuan; arXiv 2509.11254), Algorithms 1 and 2, equations
(7a) to (7c).
"""

import torch


def mean(tensors):
    """Average over the workers: an all-reduce, if each worker were a process."""
    return torch.stack(tensors).mean(0)


# fmt: off
# --- Algorithm 1: rank-r SSP/SVD compressor -------------- the paper's line
def ssp_comp(Q, Delta):                                    # function SSP-Comp(Q, Delta^(1..N))
    P_i = [D @ Q for D in Delta]                           #   P^(i) <- Delta^(i) Q
    P = torch.linalg.qr(mean(P_i)).Q                       #   P <- mean P^(i);  P~ <- QR(P)
    Q_i = [D.T @ P for D in Delta]                         #   Q^(i) <- (Delta^(i))^T P~
    Q = mean(Q_i)                                          #   Q <- mean Q^(i)
    return Q, [P @ q.T for q in Q_i], P @ Q.T              #   return (Q, P~ (Q^(i))^T, P~ Q^T)


def svd_comp(r, Delta):                                    # function SVD-Comp(Delta^(1..N))
    U, _, _ = torch.linalg.svd(mean(Delta))                #   Delta <- mean;  U, S, V <- SVD(Delta)
    P = U[:, :r]                                           #   P~ <- U[:, :r]
    Q_i = [D.T @ P for D in Delta]                         #   Q^(i) <- (Delta^(i))^T P~
    Q = mean(Q_i)                                          #   Q <- mean Q^(i)
    return Q, [P @ q.T for q in Q_i], P @ Q.T              #   return (Q, P~ (Q^(i))^T, P~ Q^T)


# --- Algorithm 2: PowerSGD (tau = None) and PowerSGD+
def powersgd_plus(X, Q, gradients, eta, mu, tau, steps):   # Require: eta, mu, tau, r, N
    m = torch.zeros_like(X)                                # m_{-1} = 0
    e = [torch.zeros_like(X) for _ in gradients]           # e_0^(i) = 0
    for t in range(steps):                                 # for t = 0, ..., T - 1 do
        g = [gradient(X, t) for gradient in gradients]     #   g_t^(i) <- grad F(X_t, xi_t^(i))
        Delta = [a + b for a, b in zip(g, e, strict=True)] #   Delta_t^(i) <- g_t^(i) + e_t^(i)
        if tau is None or t % tau != 0:                    #   if mod(t, tau) != 0 then
            Q, own, applied = ssp_comp(Q, Delta)           #     Q_t, D^_t^(i), D^_t <- SSP-Comp
        else:                                              #   if mod(t, tau) = 0 then
            Q, own, applied = svd_comp(Q.shape[1], Delta)  #     Q_t, D^_t^(i), D^_t <- SVD-Comp
        e = [a - b for a, b in zip(Delta, own, strict=True)]  # e_{t+1}^(i) <- D_t^(i) - D^_t^(i)
        m = mu * m + applied                               #   m_t = mu m_{t-1} + D^_t
        X = X - eta * m                                    #   X_{t+1} <- X_t - eta m_t
    return X, Q, e                                         # return X_T, with the basis and errors
# fmt: on


def least_squares(workers=4, m=30, n=20, seed=0):
    """F_i(X) = ||A_i X - B_i||^2 / 2 with A_i near the identity, and worker i's noisy
    gradients of it: returns the mean loss, and one gradient function for each worker.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    A = torch.eye(m, dtype=torch.float64) + 0.05 * normal(workers, m, m)
    B = A @ normal(m, n) + 0.1 * normal(workers, m, n)

    def loss(X):
        return (A @ X - B).square().sum().item() / (2 * workers)

    def gradient_of(i):
        return lambda X, t: A[i].T @ (A[i] @ X - B[i])

    return loss, [gradient_of(i) for i in range(workers)]


if __name__ == "__main__":
    loss, gradients = least_squares()
    X = torch.zeros(30, 20, dtype=torch.float64)
    basis = torch.linalg.qr(torch.eye(20, dtype=torch.float64)).Q
    print(f"loss before the first step: {loss(X):.3f}, after 40 steps:")
    for name, rank, tau in (
        ("uncompressed (full rank)", 20, None),
        ("PowerSGD, rank 2", 2, None),
        ("PowerSGD+, rank 2, tau = 25", 2, 25),
    ):
        Q = basis[:, :rank]
        trained, _, _ = powersgd_plus(X, Q, gradients, eta=0.05, mu=0.5, tau=tau, steps=40)
        print(f"{name}: {loss(trained):.3f}")
    print("Restarts only cost on a problem as easy as this one; examples/counterexample.py has")
    print("one on which PowerSGD stays trapped for ever and PowerSGD+ does not.")
