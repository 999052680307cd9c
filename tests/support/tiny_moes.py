"""Tiny models of every family that the inspector reads, and plain hooks that see what their experts did."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

V, D, B, T = 64, 32, 3, 10


def ids(seed: int = 0, batch: int = B, length: int = T) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))


COMMON = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
TOP2 = {"num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 8, "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 0,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    **TOP2,
}  # fmt: skip
FAMILIES: dict[str, dict] = {
    "Mixtral": {"num_local_experts": 4, **TOP2},
    "Qwen2Moe": {
        "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, **TOP2,
    },
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 16, **TOP2},
    "Olmoe": {"num_experts": 4, **TOP2},
    "DeepseekV2": {**DEEPSEEK, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    "DeepseekV3": {**DEEPSEEK, "n_group": 2, "topk_group": 1},
    "Glm4Moe": {
        "n_routed_experts": 8, "moe_intermediate_size": 16, "n_shared_experts": 1,
        "first_k_dense_replace": 0, "head_dim": 16, **TOP2,
    },
    "MiniMaxM2": {"num_local_experts": 4, "head_dim": 16, **TOP2},
    "GptOss": {"num_local_experts": 4, "head_dim": 16, **TOP2},
    "Phimoe": {"num_local_experts": 4, **TOP2},
    "GraniteMoe": {"num_local_experts": 4, **TOP2},
    "Jamba": {
        "num_experts": 4, "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1,
        "attn_layer_offset": 0, "use_mamba_kernels": False, **TOP2,
    },
    "JetMoe": {"num_local_experts": 4, "kv_channels": 16, "num_attention_heads": 4, **TOP2},
    "Ernie4_5_Moe": {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0,
    },
    "HunYuanMoEV1": {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "Lfm2Moe": {
        "num_experts": 4, "moe_intermediate_size": 16, "num_dense_layers": 0,
        "layer_types": ["full_attention", "conv"], **TOP2,
    },
}  # fmt: skip
OTHERS = ("Dbrx", "Llama4", "SwitchTransformers", "NllbMoe")


def causal_lm(family: str, seed: int = 0, **changes: object) -> nn.Module | None:
    """None where the installed transformers has no such family."""
    import transformers

    if not hasattr(transformers, f"{family}Config"):
        return None
    torch.manual_seed(seed)
    if family == "Dbrx":
        config = transformers.DbrxConfig(
            vocab_size=V, d_model=D, n_heads=2, n_layers=2,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        )  # fmt: skip
        return transformers.DbrxForCausalLM(config).eval()
    if family == "Llama4":
        config = transformers.Llama4TextConfig(
            **COMMON, intermediate_size_mlp=24, head_dim=16, num_local_experts=4, num_experts_per_tok=1,
            interleave_moe_layer_step=1,
        )  # fmt: skip
        return transformers.Llama4ForCausalLM(config).eval()
    if family == "SwitchTransformers":
        config = transformers.SwitchTransformersConfig(
            vocab_size=V, d_model=D, d_kv=16, d_ff=24, num_heads=2, num_layers=2, num_decoder_layers=2,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, expert_capacity=2,
            decoder_start_token_id=0,
        )  # fmt: skip
        return transformers.SwitchTransformersForConditionalGeneration(config).eval()
    if family == "NllbMoe":
        config = transformers.NllbMoeConfig(
            vocab_size=V, d_model=D, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_sparse_step=1,
            decoder_sparse_step=1, num_experts=4, expert_capacity=64,
        )  # fmt: skip
        return transformers.NllbMoeForConditionalGeneration(config).eval()
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **FAMILIES[family], **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def batches(family: str, num: int = 2) -> list[dict[str, Tensor]]:
    if family in ("SwitchTransformers", "NllbMoe"):
        return [
            {"input_ids": ids(i), "attention_mask": torch.ones(B, T), "decoder_input_ids": ids(9 + i)[:, :7]}
            for i in range(num)
        ]
    return [{"input_ids": ids(i)} for i in range(num)]


def _mixtures(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module, nn.Module, list[nn.Module]]]:
    """Name, block, router, what holds the experts, and its members with parameters."""
    for name, module in model.named_modules():
        children = dict(module.named_children())
        router = children.get("gate", children.get("router"))
        experts = children.get("experts", children.get("input_linear"))
        if router is not None and experts is not None:
            members = [m for m in experts.children() if any(True for _ in m.parameters())]
            yield name.removesuffix(".experts"), module, router, experts, members  # JetMoe's attention


def observe(model: nn.Module) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """By block and call, as filled by plain hooks: which experts served each token [N, E], and their weights.

    Experts that are modules: a token's experts are those that were given its row, and the weights solve
    "weights times the experts' own answers = the block's own output". Other experts: the indices and weights
    that they were called with, or that their router returned. Nothing of moe_lib is used.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, module, router, experts, members in _mixtures(model):
        children = dict(module.named_children())
        calls = found.setdefault(name, [])
        if len(members) > 1 and len({type(m) for m in members}) == 1:
            others = [child for key, child in children.items() if key.startswith("shared")]
            _solve(module, members, [c for c in others if not isinstance(c, nn.Linear)], calls)
        elif "input_linear" in children:  # tokens sorted by expert; sizes by expert

            def sorted_by_expert(module: nn.Module, args: tuple, output: tuple, calls: list = calls) -> None:
                _, token_S, weight_S, sizes, logits_NE = output
                weight_NE = torch.zeros_like(logits_NE, dtype=torch.float64)
                expert_S = torch.repeat_interleave(torch.tensor(sizes))
                weight_NE[token_S, expert_S] = weight_S.double()
                calls.append((weight_NE != 0, weight_NE))

            router.register_forward_hook(sorted_by_expert)
        elif type(module).__name__ == "Llama4TextMoe":  # every expert runs, most of them on zeros
            router.register_forward_hook(
                lambda module, args, output, calls=calls: calls.append((output[0] > 0, output[0].double()))
            )
        else:
            size = next(p.shape[0] for p in router.parameters())

            def called_with(module: nn.Module, args: tuple, kwargs: dict, calls: list = calls,
                            size: int = size) -> None:  # fmt: skip
                given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
                index_NK = next(v for v in given if v.dtype == torch.int64).flatten(0, -2)
                floats = [v.double().flatten(0, -2) for v in given[1:] if v.is_floating_point()]
                weight_NK = next((v for v in floats if v.shape == index_NK.shape), None)
                if weight_NK is None:
                    weight_NK = floats[0].gather(1, index_NK)
                empty_NE = torch.zeros(len(index_NK), size, dtype=torch.float64)
                weight_NE = empty_NE.scatter(1, index_NK, weight_NK)
                calls.append((empty_NE.scatter(1, index_NK, 1.0) > 0, weight_NE))

            experts.register_forward_pre_hook(called_with, with_kwargs=True)
    return found


def _solve(module: nn.Module, members: list[nn.Module], others: list[nn.Module], calls: list) -> None:
    """Hooks that find each token's experts by their rows, and the weights by least squares."""
    seen: list[tuple[int, Tensor, Tensor]] = []
    rest: list[Tensor] = []

    def rows(value: object) -> Tensor:
        tensor = value if isinstance(value, Tensor) else value[0]  # type: ignore[index]
        return tensor.reshape(-1, tensor.shape[-1]).double()

    for e, member in enumerate(members):
        member.register_forward_hook(lambda m, args, out, e=e: seen.append((e, rows(args[0]), rows(out))))
    for other in others:
        other.register_forward_hook(lambda m, args, out: rest.append(rows(out)))

    def ends(module: nn.Module, args: tuple, output: object) -> None:
        tokens_ND, output_ND = rows(args[0]), rows(output)
        answers: list[dict[int, Tensor]] = [{} for _ in tokens_ND]
        for e, read_RD, answer_RD in seen:
            for row_D, answer_D in zip(read_RD, answer_RD, strict=True):
                for n in (tokens_ND == row_D).all(1).nonzero().flatten().tolist():
                    answers[n][e] = answer_D
        weight_NE = torch.zeros(len(tokens_ND), len(members), dtype=torch.float64)
        served_NE = torch.zeros_like(weight_NE, dtype=torch.bool)
        for n, by_expert in enumerate(answers):
            if by_expert:
                columns_DR = torch.stack([*by_expert.values(), *(other_ND[n] for other_ND in rest)], 1)
                solved = torch.linalg.lstsq(columns_DR, output_ND[n, :, None]).solution.flatten()
                assert (columns_DR @ solved - output_ND[n]).norm() < 1e-5 * output_ND[n].norm()
                weight_NE[n, [*by_expert]] = solved[: len(by_expert)]
                served_NE[n, [*by_expert]] = True
        calls.append((served_NE, weight_NE))
        seen.clear()
        rest.clear()

    module.register_forward_hook(ends)
