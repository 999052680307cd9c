"""What the inspector says of a block's routing, by loops over tokens in float64.

Shapes: N tokens, D width, E experts.
"""

import itertools
import math
from collections import Counter

import numpy as np
from reference import array, entropy


def measures(served_NE, weight_NE, labels_N, follows_N, valid_N=None, tokens_ND=None):
    """How often each expert was chosen, and the measures by name.

    A token's weights are made to sum to 1. `follows_N`: is the next token its successor? Padding
    (`valid_N` False) is not counted, and labels below 0 are not by class.
    """
    served_NE, weight_NE = array(served_NE), np.abs(array(weight_NE))
    num_experts = served_NE.shape[1]
    tokens = [n for n in range(len(served_NE)) if valid_N is None or valid_N[n]]
    chosen = {n: set(np.flatnonzero(served_NE[n]).tolist()) for n in tokens}
    used = [n for n in tokens if chosen[n]]
    share = {n: weight_NE[n] / weight_NE[n].sum() for n in used}
    count_E = [sum(e in chosen[n] for n in used) for e in range(num_experts)]
    slots, top_k = sum(count_E), max(len(chosen[n]) for n in used)
    marginal = entropy(sum(share.values()) / len(used))
    per_token = sum(entropy(share[n]) for n in used) / len(used)
    pairs = [(chosen[n], chosen[n + 1]) for n in used if follows_N[n] and chosen.get(n + 1)]
    kept = [len(one & other) / max(len(one), len(other)) for one, other in pairs]
    joint = Counter((int(labels_N[n]), e) for n in used for e in chosen[n] if labels_N[n] >= 0)
    labelled, of_class, of_expert = sum(joint.values()), Counter(), Counter()
    for (label, e), count in joint.items():
        of_class[label] += count
        of_expert[e] += count
    found = {
        "never chosen": count_E.count(0),
        "largest load": max(count_E) / slots,
        "dropped": 1 - len(used) / len(tokens),
        "unfilled": 1 - slots / (len(tokens) * top_k),
        "effective experts": math.exp(entropy([count / slots for count in count_E])),
        "H(E)": marginal,
        "H(E|x)": per_token,
        "I(x;E)": marginal - per_token,
        "I(c;E)": sum(count / labelled * math.log(count * labelled / of_class[label] / of_expert[e])
                      for (label, e), count in joint.items()),
        "switching": 1 - sum(kept) / len(kept),
    }  # fmt: skip
    if top_k > 1:
        found["co-activation"] = max(
            sum({a, b} <= chosen[n] for n in used) / min(count_E[a], count_E[b])
            for a, b in itertools.combinations(range(num_experts), 2)
            if count_E[a] and count_E[b]
        )
    if tokens_ND is not None:
        apart_ND = array(tokens_ND)[used]
        apart_ND = apart_ND - apart_ND.mean(0)
        first_N = np.array([share[n].argmax() for n in used])
        groups = [apart_ND[first_N == e] for e in set(first_N.tolist())]
        between = sum(len(group) * (group.mean(0) ** 2).sum() for group in groups)
        found["input separation"] = between / (apart_ND**2).sum()
    return count_E, found
