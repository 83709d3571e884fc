"""A checkpoint of Megatron by its own writer, on CPUs: `write_megatron.py TENSOR_PARALLEL PIPELINE KIND OUT`.

Writes `OUT/iter_0000001`; `OUT/state_RANK.pt`, every rank's own state; and `OUT/logits.pt`: tokens, and the logits that
Megatron's own model gives for them.
"""

import contextlib
import importlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

TOKENS = torch.arange(24).reshape(2, 12) * 5 % 128


def build(kind: str, tensor_parallel: int, pipeline: int) -> Any:
    core: Any = importlib.import_module("megatron.core")  # not installed with the tests
    gpt: Any = importlib.import_module("megatron.core.models.gpt.gpt_model")
    specs: Any = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    transformer: Any = importlib.import_module("megatron.core.transformer.transformer_config")
    torch.manual_seed(7)
    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48, "moe_aux_loss_coeff": 0.0}
    norm = {"qk_layernorm": "bias" not in kind, "normalization": "RMSNorm"}
    settings = transformer.TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        ffn_hidden_size=48,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        add_bias_linear=False,
        add_qkv_bias="bias" in kind,
        layernorm_epsilon=1e-6,
        use_cpu_initialization=True,
        init_method_std=0.2,
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        hetereogenous_dist_checkpoint="layers" in kind,
        **norm,
        **(experts if "experts" in kind else {}),
    )
    model = gpt.GPTModel(
        settings,
        specs.get_gpt_layer_local_spec(num_experts=4 if "experts" in kind else None, **norm),
        vocab_size=128,
        max_sequence_length=64,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        pre_process=core.parallel_state.is_pipeline_first_stage(),
        post_process=core.parallel_state.is_pipeline_last_stage(),
    )
    for name, parameter in model.named_parameters():  # norms and biases of one and zero would hide mistakes
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


def write(rank: int, tensor_parallel: int, pipeline: int, kind: str, out: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.synchronize = lambda *_: None  # which its writer calls wherever it runs
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.distributed.init_process_group("gloo", rank=rank, world_size=tensor_parallel * pipeline)
    core: Any = importlib.import_module("megatron.core")
    checkpointing: Any = importlib.import_module("megatron.core.dist_checkpointing")
    core.parallel_state.initialize_model_parallel(tensor_parallel, pipeline)
    model = build(kind, tensor_parallel, pipeline)
    plain = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    torch.save(plain, Path(out) / f"state_{rank}.pt")
    if tensor_parallel == pipeline == 1 and "experts" not in kind:  # its router needs a GPU's library
        places = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
        causal = torch.ones(1, 1, len(places[0]), len(places[0])).triu(1).bool()
        random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
        random.get_cuda_rng_tracker().fork = contextlib.nullcontext
        with torch.no_grad():
            torch.save((TOKENS, model(TOKENS, places, causal)), Path(out) / "logits.pt")
    state = model.sharded_state_dict(metadata={"singleton_local_shards": "apart" in kind})
    folder = Path(out) / "iter_0000001"
    folder.mkdir(parents=True, exist_ok=True)
    checkpointing.save(state, str(folder))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    ranks, stages = int(sys.argv[1]), int(sys.argv[2])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = free.getsockname()[1]
    Path(sys.argv[4]).mkdir(parents=True, exist_ok=True)
    mp.start_processes(write, args=(ranks, stages, *sys.argv[3:5], at), nprocs=ranks * stages, start_method="spawn")
