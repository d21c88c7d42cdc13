"""The explicit form of decorrelated layers, y = L W z with z = R x, in the plainest words: what the engine must equal.

Nothing here calls the engine. Statistics come from patches that are really formed, R is always a dense D x D matrix,
W is the parameter that the optimizer trains.
"""

import torch
import torch.nn.functional as F
from torch import nn


class ExplicitLayer(nn.Module):
    """A layer y = L (W (R x)) with dense R and L, made from a plain convolution or linear layer.

    Args:
        plain: the layer.
        config: with "input" or "both" for its sides.
        centred: whether the statistics are those of centred inputs, for a layer in front of a BatchNorm.
    """

    def __init__(self, plain: nn.Conv2d | nn.Linear, config, centred=False) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(plain.weight.detach().clone())
        self.bias = None if plain.bias is None else nn.Parameter(plain.bias.detach().clone())
        self.conv = plain if isinstance(plain, nn.Conv2d) else None
        self.groups = self.conv.groups if self.conv else 1
        self.channels = plain.weight.shape[1]
        self.positions = plain.weight[0, 0].numel() if self.conv else 1
        self.dim = self.channels * self.positions
        self.R = torch.eye(self.dim, dtype=self.weight.dtype).repeat(self.groups, 1, 1)
        self.outputs = len(plain.weight) // self.groups
        self.two_sided = config.sides == "both" and 1 < self.outputs <= 2 * self.dim
        self.L = torch.eye(self.outputs, dtype=self.weight.dtype).repeat(self.groups, 1, 1)
        self.errors = self.L.clone()  # their running second moment
        self.c = 1.0  # the scale: z = c R x
        self.centred = centred and config.center and config.rule == "whiten"
        self.running = None

    def patches(self, x):
        """(g, rows, D)."""
        if self.conv is None:
            return x.reshape(1, -1, self.dim)
        conv = self.conv
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        p = F.unfold(x, conv.kernel_size, conv.dilation, 0, conv.stride)
        return p.view(len(x), self.groups, self.dim, -1).permute(1, 0, 3, 2).reshape(self.groups, -1, self.dim)

    def forward(self, x):
        p = self.patches(x)
        self.p = p.detach()
        self.images = len(x)
        z = self.c * p @ self.R.mT
        w = self.weight.reshape(self.groups, -1, self.dim)
        y = z @ w.mT @ self.L.mT  # (g, rows, O)
        if self.conv is None:
            y = y[0].view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        y = y.view(self.groups, len(x), -1, w.shape[1]).permute(1, 0, 3, 2).flatten(1, 2)
        out = F.conv2d(x[:1], self.weight, None, self.conv.stride, self.conv.padding, self.conv.dilation, self.groups)
        y = y.unflatten(2, out.shape[2:])
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    @property
    def kernel(self):
        """A = c L W R, shaped like the weight."""
        return self.c * (self.L @ self.weight.detach().reshape(self.groups, -1, self.dim) @ self.R).reshape(
            self.weight.shape
        )

    @torch.no_grad()
    def look(self):
        """Let the gradient, that of W is c L^T (dloss / dA) R^T, into the moment of the errors before L."""
        if not self.two_sided:
            return
        for i, own in enumerate(self.weight.grad.reshape(self.groups, -1, self.dim) / self.c):
            errors = torch.linalg.solve(self.L[i].mT, own)
            moment = errors @ errors.T
            moment = moment / moment.diagonal().mean()
            self.errors[i] = self.config.output_decay * self.errors[i] + (1 - self.config.output_decay) * moment

    def output_root(self, moment):
        """L: all but the leading `rank` eigenvalues by their mean, damped, to the power -1/2."""
        values, vectors = torch.linalg.eigh(moment / moment.diagonal().mean())
        rest = max(0, self.outputs - self.config.rank)
        if rest:
            values = torch.cat([values[:rest].mean().expand(rest), values[rest:]])
        return vectors @ torch.diag((values + self.config.output_damping) ** -0.5) @ vectors.T

    @torch.no_grad()
    def refresh(self):
        config = self.config
        p = self.p
        if config.sample < 1:
            rows = p.view(self.groups, self.images, -1, self.dim)
            count = max(1, round(self.images * config.sample))
            p = rows[:, [i * self.images // count for i in range(count)]].flatten(1, 2)
        if self.centred:
            p = p - p.mean(1, keepdim=True)
        sigma = p.mT @ p / p.shape[1]
        if config.rule == "crgd":
            rows = p - p.mean(1, keepdim=True)
            new = [self.crgd_step(part, r) for part, r in zip(rows, self.R, strict=True)]
        else:
            new = self.dbp(sigma) if config.rule == "dbp" else self.whiten(sigma)
        new = torch.stack(new)
        new_l = torch.stack([self.output_root(m) for m in self.errors]) if self.two_sided else self.L
        if config.preserve_function:
            w = self.weight.reshape(self.groups, -1, self.dim)
            w = torch.linalg.inv(new_l) @ self.L @ w @ self.R @ torch.linalg.inv(new)
            self.weight.copy_(w.reshape(self.weight.shape))
        self.R, self.L = new, new_l

    def dbp(self, sigma):
        if self.config.structure == "space":
            return self.in_space(self.space_factor(sigma).mean(0), self.dbp_step)
        return [self.dbp_step(s, r) for s, r in zip(sigma, self.R, strict=True)]

    def crgd_step(self, rows, r):
        """From centred rows: decorrelate, then give each entry its variance back."""
        z = rows @ r.T
        move = torch.zeros_like(r)
        for i in range(len(r)):
            for j in range(len(r)):
                if i != j:
                    move[i, j] = (z[:, i] * z[:, j]).mean()
        r = self.moved(r, move)
        gain = (rows.square().mean(0) / (rows @ r.T).square().mean(0)).sqrt()
        return torch.diag(gain) @ r

    def dbp_step(self, sigma, r):
        z2 = r @ sigma @ r.T
        move = torch.zeros_like(r)
        for i in range(len(r)):  # the paper, entry by entry
            for j in range(len(r)):
                if i != j:
                    move[i, j] = (1 - self.config.kappa) * z2[i, j]
                elif z2[i, i] > 0:
                    move[i, i] = self.config.kappa * (z2[i, i] - 1)
        return self.moved(r, move)

    def moved(self, r, move):
        """R after a step, which is shortened where it is longer than 1."""
        length = self.config.decor_lr * move.square().sum().sqrt()
        return r - self.config.decor_lr / max(1.0, float(length)) * move @ r

    def whiten(self, sigma):
        config = self.config
        if config.structure == "full":
            eye = torch.eye(self.dim, dtype=sigma.dtype)
            return [torch.linalg.inv(torch.linalg.cholesky(s + config.damping * eye)) for s in self.average(sigma)]
        if config.structure == "space":

            def root(s, _):
                values, vectors = torch.linalg.eigh(s)
                return vectors @ torch.diag((values + config.damping) ** -0.5) @ vectors.T

            return self.in_space(self.average(self.space_factor(sigma).mean(0)[None])[0], root)
        channel = self.channel_factor(sigma)
        channel, space = self.average(channel, self.space_factor(sigma))
        return [self.joint_root(c, s) for c, s in zip(channel, space, strict=True)]

    def joint_root(self, channel, space):
        (lc, qc), (ls, qs) = torch.linalg.eigh(channel), torch.linalg.eigh(space)
        lc = lc.clone()
        rest = max(0, self.channels - self.config.rank)
        if rest:
            lc[:rest] = lc[:rest].mean()
        q = torch.kron(qc.contiguous(), qs.contiguous())
        return q @ torch.diag((torch.kron(lc, ls) + self.config.damping) ** -0.5) @ q.T

    def average(self, *fresh):
        """Running averages in units of the mean eigenvalue, then normalised again for use."""
        unit = [s / s.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] for s in fresh]
        keep = self.config.stat_decay
        old = self.running
        self.running = unit if old is None else [keep * o + (1 - keep) * u for o, u in zip(old, unit, strict=True)]
        return self.running[0] if len(unit) == 1 else self.running

    def channel_factor(self, sigma):
        return torch.einsum("gcsds->gcd", sigma.view(self.groups, *(self.channels, self.positions) * 2))

    def space_factor(self, sigma):
        return torch.einsum("gcsct->gst", sigma.view(self.groups, *(self.channels, self.positions) * 2)) / self.channels

    def in_space(self, sigma, function):
        small = self.R[0, : self.positions, : self.positions]
        dense = torch.kron(torch.eye(self.channels, dtype=sigma.dtype), function(sigma, small))
        return [dense] * self.groups


@torch.no_grad()
def measured(layers, optimizer, starts, stepped, gradients):
    """The scale with which a step would have been as long as the plain optimizer's, with the layers' R and L.

    SGD's step is in proportion to the gradient; of the others' the movement of W is that of a plain step on W. Decay is
    left out.

    Args:
        layers: ExplicitLayer, all of the network.
        optimizer: that stepped.
        starts: the layers' W before the step.
        stepped: W after it.
        gradients: of the kernels.
    """
    plain = ours = 0.0
    for layer, start, end, gradient in zip(layers, starts, stepped, gradients, strict=True):
        left, right = layer.L, layer.R
        group = next(g for g in optimizer.param_groups if any(p is layer.weight for p in g["params"]))
        if isinstance(optimizer, torch.optim.SGD):
            step = gradient * group["lr"]
            moved = left @ left.mT @ step @ right.mT @ right
        else:
            step, was = (t.reshape(layer.groups, -1, layer.dim) for t in (end - start, start))
            if isinstance(optimizer, torch.optim.Adam) and not isinstance(optimizer, torch.optim.AdamW):
                step = step - was * (step * was).sum() / was.square().sum()
            else:
                muon = "momentum_buffer" in optimizer.state[layer.weight]  # else it is its AdamW's
                rate = group["lr"] * (1 if muon else group.get("fallback_lr_scale", 1))
                step = step + was * rate * group["weight_decay"]
            moved = left @ step @ right
        plain, ours = plain + step.square().sum(), ours + moved.square().sum()
    power = 4 if isinstance(optimizer, torch.optim.SGD) else 2
    return float(plain / ours) ** (1 / power)


def kernel_gradient(layer):
    """dloss / dA from that of W."""
    own = layer.weight.grad.reshape(layer.groups, -1, layer.dim) / layer.c
    return torch.linalg.inv(layer.L).mT @ own @ torch.linalg.inv(layer.R).mT


@torch.no_grad()
def rescale(layers, c):
    """Another scale; W follows, so that no kernel changes."""
    for layer in layers:
        layer.weight.mul_(layer.c / c)
        layer.c = c


def explicit_twin(model: nn.Module, config, fits, centred=()) -> nn.Module:
    """A deep copy of a plain model whose layers that `fits(layer)` are explicit; `centred`: those before a norm."""
    import copy

    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.Conv2d | nn.Linear) and fits(module):
            parent = twin.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], ExplicitLayer(module, config, name in centred))
    return twin
