"""Plain forms of the transformers and of what is measured on them: loops over float64 numbers.

A model's weights are read from its state dict by name; its arithmetic is written anew.

Shapes: B sequences, T positions, N = B * T tokens, D width, E experts, K chosen experts, V vocabulary.
"""

import math

import numpy as np
import reference
import reference_ac
from reference import array


def weights_of(module):
    """Name -> float64 array, of parameters and buffers."""
    return {name: array(value) for name, value in module.state_dict().items()}


def part(weights, prefix):
    """The weights below a prefix, which their names lose."""
    return {name[len(prefix) + 1 :]: w for name, w in weights.items() if name.startswith(prefix + ".")}


# ---------------------------------------------------------------------------------------- networks


def linear(x_D, weights):
    rows = zip(weights["weight"], weights["bias"], strict=True)
    return np.array([math.fsum(row_D * x_D) + bias for row_D, bias in rows])


def layer_norm(x_D, weights, eps=1e-5):
    mean = math.fsum(x_D) / len(x_D)
    variance = math.fsum((x_D - mean) ** 2) / len(x_D)
    return (x_D - mean) / math.sqrt(variance + eps) * weights["weight"] + weights["bias"]


def attention(x_TD, weights, num_heads, causal):
    """Of one sequence: query, key and value are the thirds of `qkv`, heads are slices of each."""
    length, dim = x_TD.shape
    size = dim // num_heads
    triples = [linear(x_D, part(weights, "qkv")) for x_D in x_TD]
    out_TD = np.zeros((length, dim))
    for head in range(num_heads):
        at = slice(head * size, (head + 1) * size)
        query, key, value = ([triple[i * dim : (i + 1) * dim][at] for triple in triples] for i in range(3))
        for t in range(length):
            seen = range(t + 1) if causal else range(length)
            share = reference.softmax([float(query[t] @ key[s]) / math.sqrt(size) for s in seen])
            for s in seen:
                out_TD[t, at] += share[s] * value[s]
    return np.stack([linear(x_D, part(weights, "out")) for x_D in out_TD])


# ----------------------------------------------------------------------------------------- routing


def rows_of_averages(running_ED, seen_E, eps=1e-4, max_ratio=10.0):
    """M of the causal form under "feature": from averages of the dispersion, ones where there is none."""
    num_experts = len(seen_E)
    weight = {k: [1 / (s + eps) for s in running_ED[k]] for k in range(num_experts) if seen_E[k]}
    entries = [w for row in weight.values() for w in row]
    rows_ED = np.ones(running_ED.shape)
    for q in range(running_ED.shape[1]):
        limited = {k: min(row[q], max_ratio * math.fsum(entries) / len(entries)) for k, row in weight.items()}
        for k, w in limited.items():
            rows_ED[k, q] = w * len(limited) / math.fsum(limited.values())
    return rows_ED


def rows_of_batch(tokens_ND, assignment_N, num_experts, ac):
    return reference_ac.adaptive_scales(
        tokens_ND, assignment_N, num_experts, ac.dispersion, ac.eps, ac.normalize, ac.max_ratio
    )


def scaled_tokens(tokens_ND, previous_NE, rows_ED, ac, top_k):
    """M h, token by token; `previous_NE` the earlier layer's gates."""
    out_ND = np.zeros(tokens_ND.shape)
    for n, token_D in enumerate(tokens_ND):
        chosen, shares = reference.top_k(list(previous_NE[n]), top_k if ac.mixed else 1)
        for k, share in zip(chosen, shares, strict=True):
            out_ND[n] += share * rows_ED[k] * token_D
        if ac.matched:
            out_ND[n] *= math.sqrt(math.fsum(token_D**2) / math.fsum(out_ND[n] ** 2))
    return out_ND


def moe_layer(tokens_ND, weights, config, previous_NE):
    """[N, D] output and [N, E] gates of one MoE layer; `previous_NE` None: no earlier decision."""
    router, num_experts = part(weights, "router"), config.num_experts
    experts_see_ND = scaled_ND = tokens_ND
    if config.router == "ac" and previous_NE is not None:
        assignment_N = [max(range(num_experts), key=lambda e: gate_E[e]) for gate_E in previous_NE]
        if config.ac.causal:
            rows_ED = rows_of_averages(router["running_ED"], router["seen_E"])
        else:
            rows_ED = rows_of_batch(tokens_ND, assignment_N, num_experts, config.ac)
        scaled_ND = scaled_tokens(tokens_ND, previous_NE, rows_ED, config.ac, config.top_k)
        if config.ac.scale_experts:
            experts_see_ND = scaled_ND
    if config.router == "linear":
        logits_NE = [linear(token_D, part(router, "gate")) for token_D in tokens_ND]
    else:
        logits_NE = reference_ac.scores(scaled_ND, router["embeddings_ED"])
    gates_NE = np.stack([reference.softmax(row) for row in logits_NE])
    chosen = [reference.top_k(list(gate_E), config.top_k) for gate_E in gates_NE]
    if config.top_k == 1:  # the probability itself is the weight
        chosen = [(best, [gate_E[best[0]]]) for (best, _), gate_E in zip(chosen, gates_NE, strict=True)]
    stacked = [weights[f"experts.{name}"] for name in ("w1_EDH", "b1_EH", "w2_EHO", "b2_EO")]
    indices_NK, weights_NK = np.array([c for c, _ in chosen]), np.array([w for _, w in chosen])
    return reference.moe(experts_see_ND, indices_NK, weights_NK, *stacked), gates_NE


# ------------------------------------------------------------------------------------------ models


def block(x_BTD, weights, config, with_experts, causal, previous_NE):
    """[B, T, D], and the gates of the block's MoE layer or None."""
    x_BTD = x_BTD.copy()
    for b, x_TD in enumerate(x_BTD):
        normed_TD = np.stack([layer_norm(x_D, part(weights, "norm1")) for x_D in x_TD])
        x_BTD[b] += attention(normed_TD, part(weights, "attention"), config.num_heads, causal)
    tokens_ND = np.stack([layer_norm(x_D, part(weights, "norm2")) for x_TD in x_BTD for x_D in x_TD])
    network, gates_NE = part(weights, "feed_forward"), None
    if with_experts:
        out_ND, gates_NE = moe_layer(tokens_ND, network, config, previous_NE)
    else:
        hidden = [np.maximum(linear(token_D, part(network, "0")), 0) for token_D in tokens_ND]
        out_ND = np.stack([linear(hidden_D, part(network, "2")) for hidden_D in hidden])
    return x_BTD + out_ND.reshape(x_BTD.shape), gates_NE


def log_softmax(logits_V):
    total = reference.log_sum_exp([float(z) for z in logits_V])
    return np.array([float(z) - total for z in logits_V])


def language_model(tokens_BT, model, config):
    """[B, T, V] log-probabilities, and the gates of each MoE layer."""
    weights, trunk, tokens_BT = weights_of(model), config.trunk, array(tokens_BT)
    embedded = [
        [weights["token.weight"][v] + weights["position.weight"][t] for t, v in enumerate(row)]
        for row in tokens_BT
    ]
    x_BTD, previous_NE, gates = np.array(embedded), None, []
    for index in range(trunk.depth):
        with_experts = index in trunk.moe_blocks
        own = part(weights, f"blocks.{index}")
        x_BTD, gates_NE = block(x_BTD, own, trunk, with_experts, True, previous_NE)
        if with_experts:
            previous_NE = gates_NE
            gates.append(gates_NE)
    norm, head = part(weights, "norm"), part(weights, "head")
    out = [[log_softmax(linear(layer_norm(x_D, norm), head)) for x_D in x_TD] for x_TD in x_BTD]
    return np.array(out), gates


def patches(image_CHW, side):
    """Row by row of the image; a patch is read channel by channel."""
    channels, height, width = image_CHW.shape
    found = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            found.append(
                [
                    image_CHW[c, top + i, left + j] * 2 - 1
                    for c in range(channels)
                    for i in range(side)
                    for j in range(side)
                ]
            )
    return np.array(found)


def vision_transformer(images_NCHW, model, config):
    """[N, C] log-probabilities, the gates of each MoE layer, and the mean token before the first [N, D]."""
    weights, trunk, images_NCHW = weights_of(model), config.trunk, array(images_NCHW)
    x_NTD = np.array(
        [
            [
                linear(patch_F, part(weights, "embed")) + weights["position.weight"][t]
                for t, patch_F in enumerate(patches(image_CHW, config.patch))
            ]
            for image_CHW in images_NCHW
        ]
    )
    previous_NE, gates, stem_ND = None, [], None
    for index in range(trunk.depth):
        with_experts = index in trunk.moe_blocks
        if with_experts and stem_ND is None:
            stem_ND = x_NTD.mean(1)
        own = part(weights, f"blocks.{index}")
        x_NTD, gates_NE = block(x_NTD, own, trunk, with_experts, False, previous_NE)
        if with_experts:
            previous_NE = gates_NE
            gates.append(gates_NE)
    norm, head = part(weights, "norm"), part(weights, "head")
    out = [log_softmax(linear(layer_norm(x_TD.mean(0), norm), head)) for x_TD in x_NTD]
    return np.array(out), gates, stem_ND


# ------------------------------------------------------------------------------------------ scores


def chosen_sets(gates_NE, top_k):
    return [set(reference.top_k(list(gate_E), top_k)[0]) for gate_E in array(gates_NE)]


def predicted_one_by_one(predict, tokens, context):
    """Negative log-likelihood of every token but the first, one window at a time.

    Windows start at multiples of half the context (at least 1), the last one ends with the text; a token is
    scored in the first window that holds it as a target. `predict`: tokens -> [T, V] log-probabilities.
    """
    targets = len(tokens) - 1
    starts = sorted({*range(0, targets - context, max(context // 2, 1)), targets - context})
    losses, right = [], []
    for t in range(1, len(tokens)):
        start = next(s for s in starts if s < t <= s + context)
        row = predict(tokens[start : start + context])[t - start - 1]
        losses.append(-float(row[tokens[t]]))
        right.append(int(np.argmax(row)) == tokens[t])
    return losses, right
