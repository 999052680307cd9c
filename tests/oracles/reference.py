"""Plain forms of what moe_lib computes: loops over float64 numbers, never optimised.

Arguments are anything numpy can read (CPU tensors included); results are Python floats or numpy arrays.

Shapes: N samples, D width, E experts, K chosen experts, H expert hidden width, C classes, P parameters.
"""

import itertools
import math

import numpy as np


def array(x):
    """A float64 (or, for integers, int64) copy."""
    x = np.asarray(x.detach() if hasattr(x, "detach") else x)
    return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)


def log_sum_exp(values):
    """log(sum(exp(v))), without overflow; minus infinity for an empty list."""
    largest = max(values, default=-math.inf)
    if largest == -math.inf:
        return -math.inf
    return largest + math.log(math.fsum(math.exp(v - largest) for v in values))


# ------------------------------------------------------------------------------------------- SNNL


def distance_of(a_D, b_D, distance):
    if distance == "sqeuclidean":
        return math.fsum((float(x) - float(y)) ** 2 for x, y in zip(a_D, b_D, strict=True))
    norm_a = math.sqrt(math.fsum(float(x) ** 2 for x in a_D))
    norm_b = math.sqrt(math.fsum(float(x) ** 2 for x in b_D))
    if norm_a == 0 or norm_b == 0:
        return 1.0
    # |a/|a| - b/|b||^2 / 2 = 1 - cos(a, b), without the cancellation
    return math.fsum((float(x) / norm_a - float(y) / norm_b) ** 2 for x, y in zip(a_D, b_D, strict=True)) / 2


def snnl(features_ND, labels_N, temperature, distance="cosine", reduction="mean"):
    """Soft nearest neighbor loss, pair by pair and in log space."""
    features_ND, labels_N = array(features_ND), array(labels_N)
    losses, anchors_with_positive = [], 0
    for i in range(len(labels_N)):
        same, everyone = [], []
        for j in range(len(labels_N)):
            if j == i:
                continue
            score = -distance_of(features_ND[i], features_ND[j], distance) / temperature
            everyone.append(score)
            if labels_N[i] == labels_N[j]:
                same.append(score)
        anchors_with_positive += bool(same)
        losses.append(log_sum_exp(everyone) - log_sum_exp(same) if same else 0.0)
    if reduction == "none":
        return np.array(losses)
    total = math.fsum(losses)
    if reduction == "sum":
        return total
    if reduction == "mean_all":
        return total / len(losses)
    return total / max(anchors_with_positive, 1)


def snnl_slope(features_ND, labels_N, temperature, distance="cosine"):
    """d/dT of the summed loss: of each anchor, (mean distance to everyone - to its positives) / T^2, the
    means weighted by exp(-distance / T)."""
    features_ND, labels_N = array(features_ND), array(labels_N)
    slopes = []
    for i in range(len(labels_N)):
        pairs = [
            (distance_of(features_ND[i], features_ND[j], distance), labels_N[i] == labels_N[j])
            for j in range(len(labels_N))
            if j != i
        ]
        means = []
        for wanted in (lambda same: same, lambda same: True):
            distances = [d for d, same in pairs if wanted(same)]
            least = min(distances, default=0.0)
            masses = [math.exp((least - d) / temperature) for d in distances]
            weighted = math.fsum(d * mass for d, mass in zip(distances, masses, strict=True))
            means.append(weighted / math.fsum(masses) if masses else None)
        if means[0] is not None:
            slopes.append((means[1] - means[0]) / temperature / temperature)
    return math.fsum(slopes)


def snnl_with_eps(features_ND, labels_N, temperature, eps=1e-5):
    """The form of the authors' public code (cosine, mean over all): caps at -log(eps), or turns NaN.

    Follows it step by step, in the precision of the features.
    """
    features_ND, labels_N = np.asarray(features_ND), array(labels_N)
    unit_ND = features_ND / np.sqrt((features_ND**2).sum(1, keepdims=True))
    with np.errstate(all="ignore"):
        mass_NN = np.exp(-(1 - unit_ND @ unit_ND.T) / features_ND.dtype.type(temperature))
        mass_NN = mass_NN - np.eye(len(labels_N), dtype=features_ND.dtype)
        pick_NN = mass_NN / (eps + mass_NN.sum(1, keepdims=True))
        same_NN = labels_N[:, None] == labels_N[None, :]
        return float(-np.log(eps + (pick_NN * same_NN).sum(1)).mean())


# ---------------------------------------------------------------------------------------- routing


def entropy(probabilities):
    return -math.fsum(float(p) * math.log(float(p)) for p in probabilities if p > 0)


def class_expert(probs_NE, labels_N, num_classes):
    """[C, E]: mean gate of each class, NaN where it has no sample."""
    probs_NE, labels_N = array(probs_NE), array(labels_N)
    matrix_CE = np.full((num_classes, probs_NE.shape[1]), math.nan)
    for c in range(num_classes):
        members = [n for n in range(len(labels_N)) if labels_N[n] == c]
        for e in range(probs_NE.shape[1]):
            if members:
                matrix_CE[c, e] = math.fsum(probs_NE[n, e] for n in members) / len(members)
    return matrix_CE


def routing_entropy(probs_NE, labels_N, num_classes):
    """The six values of metrics.RoutingEntropy, in its order; the informations are not differences here.

    I(x;E) is the mean divergence of a sample's gate from the mean gate, I(class;E) the sum over the joint
    distribution of class and expert.
    """
    probs_NE, labels_N = array(probs_NE), array(labels_N)
    num_samples, num_experts = probs_NE.shape
    joint_CE = np.zeros((num_classes, num_experts))
    for n in range(num_samples):
        for e in range(num_experts):
            joint_CE[labels_N[n], e] += probs_NE[n, e] / num_samples
    of_class_C, of_expert_E = joint_CE.sum(1), joint_CE.sum(0)
    per_sample = math.fsum(entropy(probs_NE[n]) for n in range(num_samples)) / num_samples
    class_conditional = expert_class = information_input = information_class = 0.0
    for c in range(num_classes):
        if of_class_C[c] > 0:
            class_conditional += of_class_C[c] * entropy(joint_CE[c] / of_class_C[c])
    for e in range(num_experts):
        if of_expert_E[e] > 0:
            expert_class += of_expert_E[e] * entropy(joint_CE[:, e] / of_expert_E[e])
    for n in range(num_samples):
        for e in range(num_experts):
            p = probs_NE[n, e]
            if p > 0:
                information_input += p * math.log(p / of_expert_E[e]) / num_samples
    for c in range(num_classes):
        for e in range(num_experts):
            p = joint_CE[c, e]
            if p > 0:
                information_class += p * math.log(p / (of_class_C[c] * of_expert_E[e]))
    return (
        entropy(of_expert_E),
        per_sample,
        class_conditional,
        expert_class,
        information_input,
        information_class,
    )


def load(probs_NE):
    """Share of each expert by top-1, number of dead experts, exp of the mean gate's entropy."""
    probs_NE = array(probs_NE)
    counts = [0] * probs_NE.shape[1]
    for gate_E in probs_NE:
        counts[max(range(len(gate_E)), key=lambda e: gate_E[e])] += 1
    share = [count / len(probs_NE) for count in counts]
    mean_gate = [math.fsum(probs_NE[:, e]) / len(probs_NE) for e in range(len(counts))]
    return share, counts.count(0), math.exp(entropy(mean_gate))


def load_balancing_loss(probs_NE, indices_NK):
    probs_NE, indices_NK = array(probs_NE), array(indices_NK)
    num_samples, num_experts = probs_NE.shape
    total = 0.0
    for e in range(num_experts):
        count = sum(int(chosen == e) for row in indices_NK for chosen in row)
        total += count / indices_NK.size * math.fsum(probs_NE[:, e]) / num_samples
    return num_experts * total


def top_k(probs_E, k):
    """The k best experts, best first, and their probabilities divided by their sum."""
    chosen = sorted(range(len(probs_E)), key=lambda e: -probs_E[e])[:k]
    total = math.fsum(probs_E[e] for e in chosen)
    return chosen, [probs_E[e] / total for e in chosen]


# ---------------------------------------------------------------------------------------- experts


def expert_output(x_D, w1_DH, b1_H, w2_HO, b2_O):
    hidden_H = [max(0.0, float(x_D @ w1_DH[:, h]) + b1_H[h]) for h in range(len(b1_H))]
    return np.array([float(np.dot(hidden_H, w2_HO[:, o])) + b2_O[o] for o in range(len(b2_O))])


def moe(x_ND, indices_NK, weights_NK, w1_EDH, b1_EH, w2_EHO, b2_EO):
    """Every token through every expert; the output counts as often as the token's choices name it."""
    x_ND, indices_NK, weights_NK = array(x_ND), array(indices_NK), array(weights_NK)
    w1_EDH, b1_EH, w2_EHO, b2_EO = array(w1_EDH), array(b1_EH), array(w2_EHO), array(b2_EO)
    out_NO = np.zeros((len(x_ND), b2_EO.shape[1]))
    for n in range(len(x_ND)):
        for e in range(len(w1_EDH)):
            for k in range(indices_NK.shape[1]):
                if indices_NK[n, k] == e:
                    out = expert_output(x_ND[n], w1_EDH[e], b1_EH[e], w2_EHO[e], b2_EO[e])
                    out_NO[n] += weights_NK[n, k] * out
    return out_NO


# ---------------------------------------------------------------------------------------- mixture


def softmax(logits_C):
    log_total = log_sum_exp([float(z) for z in logits_C])
    return np.array([math.exp(float(z) - log_total) for z in logits_C])


def mixture(weights_NE, logits_NEC, rule):
    """Class probabilities [N, C]."""
    weights_NE, logits_NEC = array(weights_NE), array(logits_NEC)
    probs_NC = np.zeros((logits_NEC.shape[0], logits_NEC.shape[2]))
    for n, (weights_E, logits_EC) in enumerate(zip(weights_NE, logits_NEC, strict=True)):
        if rule == "logits":
            probs_NC[n] = softmax(sum(g * z_C for g, z_C in zip(weights_E, logits_EC, strict=True)))
        else:
            probs_NC[n] = sum(g * softmax(z_C) for g, z_C in zip(weights_E, logits_EC, strict=True))
    return probs_NC


def jacobs_loss(weights_NE, logits_NEC, labels_N):
    """Mean of -log sum_e g_e exp(-|y - p_e|^2 / 2)."""
    weights_NE, logits_NEC, labels_N = array(weights_NE), array(logits_NEC), array(labels_N)
    losses = []
    for n in range(len(labels_N)):
        total = 0.0
        for e in range(weights_NE.shape[1]):
            p_C = softmax(logits_NEC[n, e])
            square = sum((float(c == labels_N[n]) - p_C[c]) ** 2 for c in range(len(p_C)))
            total += weights_NE[n, e] * math.exp(-square / 2)
        losses.append(-math.log(total))
    return math.fsum(losses) / len(losses)


def accuracy_and_cross_entropy(probs_NC, labels_N):
    right = [
        float(max(range(len(p_C)), key=lambda c: p_C[c]) == y)
        for p_C, y in zip(probs_NC, labels_N, strict=True)
    ]
    cost = [-math.log(p_C[y]) for p_C, y in zip(probs_NC, labels_N, strict=True)]
    return np.array(right), math.fsum(cost) / len(cost)


def expert_ablations(weights_NE, logits_NEC, labels_N, rule, orders):
    """As metrics of robustness.Ablations by name; `orders` are the permutations of the samples to use."""
    weights_NE, logits_NEC, labels_N = array(weights_NE), array(logits_NEC), array(labels_N)
    num_samples, num_experts, num_classes = logits_NEC.shape

    def run(weights_NE, logits_NEC=logits_NEC):
        return accuracy_and_cross_entropy(mixture(weights_NE, logits_NEC, rule), labels_N)

    clean_N, clean_cost = run(weights_NE)
    dropped, damage_CE = [], np.full((num_classes, num_experts), math.nan)
    for e in range(num_experts):
        kept_NE = np.zeros_like(weights_NE)
        for n in range(num_samples):
            others = [a for a in range(num_experts) if a != e]
            total = sum(weights_NE[n, a] for a in others)
            for a in others:
                kept_NE[n, a] = weights_NE[n, a] / total if total > 0 else 1 / len(others)
        lost_N = clean_N - run(kept_NE)[0]
        dropped.append(lost_N.mean())
        for c in range(num_classes):
            members = [n for n in range(num_samples) if labels_N[n] == c]
            if members:
                damage_CE[c, e] = sum(lost_N[n] for n in members) / len(members)
    swapped, merged = [], []
    for a, b in itertools.combinations(range(num_experts), 2):
        other_NE = weights_NE.copy()
        other_NE[:, a], other_NE[:, b] = weights_NE[:, b], weights_NE[:, a]
        swapped.append((clean_N - run(other_NE)[0]).mean())
        other_NEC = logits_NEC.copy()
        other_NEC[:, a] = other_NEC[:, b] = (logits_NEC[:, a] + logits_NEC[:, b]) / 2
        merged.append((clean_N - run(weights_NE, other_NEC)[0]).mean())
    outcomes = [run(weights_NE[list(order)]) for order in orders]
    return {
        "dropped": dropped,
        "swapped": sum(swapped) / len(swapped),
        "merged": sum(merged) / len(merged),
        "permuted": sum((clean_N - right_N).mean() for right_N, _ in outcomes) / len(outcomes),
        "permuted_cross_entropy": sum(cost - clean_cost for _, cost in outcomes) / len(outcomes),
        "damage_CE": damage_CE,
    }


# ------------------------------------------------------------------------------------- similarity


def cosine(a_P, b_P):
    norm_a, norm_b = math.sqrt(math.fsum(a_P**2)), math.sqrt(math.fsum(b_P**2))
    return math.fsum(a_P * b_P) / (norm_a * norm_b) if norm_a and norm_b else 0.0


def pairwise_similarity(vectors_EP, absolute=False):
    vectors_EP = array(vectors_EP)
    pairs = itertools.combinations(range(len(vectors_EP)), 2)
    values = [cosine(vectors_EP[a], vectors_EP[b]) for a, b in pairs]
    return sum(abs(v) if absolute else v for v in values) / len(values)


def aligned_similarity(w1_EDH, b1_EH, w2_EHO, b2_EO):
    """Tries every permutation of the second expert's hidden units; keeps the best cosine of each pair."""
    w1_EDH, b1_EH, w2_EHO, b2_EO = array(w1_EDH), array(b1_EH), array(w2_EHO), array(b2_EO)

    def flat(e, order):
        order = list(order)
        return np.concatenate(
            [w1_EDH[e][:, order].ravel(), b1_EH[e][order], w2_EHO[e][order].ravel(), b2_EO[e]]
        )

    plain = range(b1_EH.shape[1])
    values = []
    for a, b in itertools.combinations(range(len(w1_EDH)), 2):
        values.append(max(cosine(flat(a, plain), flat(b, order)) for order in itertools.permutations(plain)))
    return sum(values) / len(values)


def output_similarity(logits_NEC):
    """Mean cosine of experts' outputs, centred over classes and then over samples."""
    centred = array(logits_NEC)
    num_samples, num_experts, _ = centred.shape
    for n in range(num_samples):
        for e in range(num_experts):
            centred[n, e] -= centred[n, e].mean()
    for e in range(num_experts):
        centred[:, e] -= sum(centred[n, e] for n in range(num_samples)) / num_samples
    return pairwise_similarity([centred[:, e].ravel() for e in range(num_experts)])


def hsic(k_NN, l_NN):
    """Unbiased HSIC as the U-statistic it is: means over all tuples of distinct indices (tiny N only)."""
    n = range(len(k_NN))
    pairs = [k_NN[i, j] * l_NN[i, j] for i, j in itertools.permutations(n, 2)]
    triples = [k_NN[i, j] * l_NN[i, q] for i, j, q in itertools.permutations(n, 3)]
    quadruples = [k_NN[i, j] * l_NN[q, r] for i, j, q, r in itertools.permutations(n, 4)]
    return np.mean(pairs) + np.mean(quadruples) - 2 * np.mean(triples)


def linear_cka(x_NA, y_NB):
    x_NA, y_NB = array(x_NA), array(y_NB)
    k_NN, l_NN = x_NA @ x_NA.T, y_NB @ y_NB.T
    return hsic(k_NN, l_NN) / math.sqrt(hsic(k_NN, k_NN) * hsic(l_NN, l_NN))


# ------------------------------------------------------------------------------------------- task


def calibration_error(confidence_N, correct_N, bins=15):
    confidence_N, correct_N = array(confidence_N), array(correct_N)
    total = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        members = [n for n, p in enumerate(confidence_N) if low < p <= high or (b == 0 and p == 0)]
        if members:
            accuracy = sum(correct_N[n] for n in members) / len(members)
            confidence = sum(confidence_N[n] for n in members) / len(members)
            total += len(members) / len(confidence_N) * abs(accuracy - confidence)
    return total


def knn_accuracy(train_codes_MD, train_labels_M, codes_ND, labels_N, k=10):
    """Majority vote of the k nearest; a tie goes to the smallest label."""
    train_codes_MD, codes_ND = array(train_codes_MD), array(codes_ND)
    train_labels_M, labels_N = array(train_labels_M), array(labels_N)
    right = 0
    for code_D, label in zip(codes_ND, labels_N, strict=True):
        distances = [distance_of(code_D, other_D, "sqeuclidean") for other_D in train_codes_MD]
        nearest = sorted(range(len(distances)), key=lambda m: distances[m])[:k]
        votes = [int(train_labels_M[m]) for m in nearest]
        right += max(sorted(set(votes)), key=votes.count) == label
    return right / len(labels_N)
