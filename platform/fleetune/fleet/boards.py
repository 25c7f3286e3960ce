"""Boards, phones and servers."""

from __future__ import annotations

from typing import Literal

from fleetune.fleet.jetsons import EDGE_FLOWER, HEADLESS, HF_HARDWARE, ML_ENGINEERING
from fleetune.fleet.profile import DeviceProfile


def _other(
    name: str,
    fp32_tflops: float,
    fp16_tflops: float,
    gigabytes_per_second: float,
    memory_gb: float,
    os_idle_gb: float,
    context_gb: float,
    sustained: float,
    watts: tuple[float, float],
    *,
    launch_us: float,
    bandwidth_fraction: float = 0.8,
    bf16: Literal["native", "fp16", "fp32"] = "native",
    sources: dict[str, str],
) -> DeviceProfile:
    return DeviceProfile(
        name=name, fp32_flops=fp32_tflops * 1e12, fp16_flops=fp16_tflops * 1e12,
        sustained_fp32=sustained, sustained_fp16=sustained,
        bandwidth_bytes_per_second=gigabytes_per_second * 1e9,
        sustained_bandwidth_fraction=bandwidth_fraction,
        memory_bytes=memory_gb * 1e9, os_idle_bytes=os_idle_gb * 1e9, context_bytes=context_gb * 1e9,
        idle_watts=watts[0], active_watts=watts[1], launch_seconds=launch_us * 1e-6, bf16=bf16,
        sources=(*sources.items(), ("launch", "assumed: 10 us per CUDA kernel on a server, 5 us per "
                                              "operator on a CPU")),
    )  # fmt: skip


_PI = {
    "compute": "4 cores x clock (Pi 4: 1.8 GHz, current boards) x NEON width; no faster 16-bit rate assumed",
    "bf16": "none: the cores are older than Armv8.6",
    "sustained": "0.29: fitted to BERT-base on a Pi 4B, PyTorch, 34.02 s a step of 4 x 256 (AutoFedNLP), at 1.8 GHz: its clock "
    "is not told, and was perhaps the 1.5 GHz of earlier boards; Pi 5 assumed equal",
    "bandwidth": "12.8 GB/s, STREAM 5.5 (sci-pi.org.uk); Pi 5: 32 bit x 4267, the same fraction assumed",
    "memory": f"MemTotal assumed 0.96 of nominal; {HEADLESS}; PyTorch 0.3 GB assumed",
    "power": "Pi 5: 12.7 W under HPL (geerlingguy/top500-benchmark), Pi 4: recalled; idle assumed",
}
_PHONE_GPU = {
    "compute": "GPU peak, recalled",
    "bf16": "none assumed",
    "sustained": "about 0.01: LoRA with QVAC's llama.cpp on an Adreno 830 (github.com/tetherto/qvac-rnd-fabric-llm-finetune, "
    "docs/BENCHMARKS.md); assumed of these GPUs and of fp32",
    "bandwidth": "gist EwoutH/754fa40 (Snapdragon), recalled (Apple); 0.8 of it assumed",
    "memory": "nominal size; 4 GB used by the system and its apps, runtime 0.2 GB: assumed",
    "power": "sustained, recalled; idle assumed",
}
_PHONE_CPU = {
    "compute": "CPU, 4 x 2.4 + 4 x 1.8 GHz (EdgeFlowerTune)",
    "bf16": "none assumed",
    "sustained": "0.015: fitted to Gemma-3-270M LoRA in fp32, MobileFineTuner on the CPU, 172.3 s a step, mean of five phones "
    "(EdgeFlowerTune); 16 bit assumed equal",
    "bandwidth": "LPDDR5-3200, 32 bit; 0.8 of it assumed",
    "memory": f"7.5 GB seen ({EDGE_FLOWER}); 4 GB used by the system and its apps, runtime 0.2 GB: assumed",
    "power": "recalled; idle assumed",
}


_AS_DRIVERS = "GPU memory as drivers report it"
_AS_A100 = "GPU memory assumed in proportion to an A100's of 80 GB, whose drivers report 85.0 GB"


def _server(sustained: str, rates: str, memory: str = _AS_DRIVERS) -> dict[str, str]:
    return {
        "compute": rates,
        "sustained": f"{sustained}; fp32 assumed equal",
        "bandwidth": f"{rates}; 0.8 of it assumed",
        "memory": f"{memory}; CUDA and PyTorch 0.9 GB measured ({ML_ENGINEERING}, training/performance)",
        "power": "active: the board's limit; idle assumed 0.15 of it",
        "bf16": "compute capability 8.0 or newer, at the 16-bit rate",
    }


_LLM_ANALYSIS = "cli99/llm-analysis gpu_configs, torch._inductor.analysis.device_info"
_QWEN = "0.76: fitted to nine LoRA steps of Qwen 1.8B to 14B on an A100 (QwenLM/Qwen README)"
_FOUNDRY = (
    "0.40 assumed: pretraining on H100 reaches 282 to 459 TFLOP/s (mosaicml/llm-foundry benchmarking README), 0.29 to 0.46 of "
    "the peak with all that is bound by memory, which is counted once more here"
)
_RTX_4090 = (
    "0.87 assumed: what plain matrix products reach on an A100 (271 of 312 TFLOP/s, stas00/ml-engineering). Its own steps "
    "(torchtune README) would ask for 1.56: compiled kernels move fewer bytes than are counted"
)
# name, FP32 TFLOPS, FP16 TFLOPS, GB/s, memory GB, idle GB, runtime GB, sustained, (idle W, active W)
BOARDS = (
    _other("raspberry-pi-4-4gb", 0.0576, 0.0576, 12.8, 4.12, 0.8, 0.3, 0.29, (2.7, 6.5), launch_us=5,
           bandwidth_fraction=0.43, bf16="fp32", sources=_PI),
    _other("raspberry-pi-4-8gb", 0.0576, 0.0576, 12.8, 8.25, 0.8, 0.3, 0.29, (2.7, 6.5), launch_us=5,
           bandwidth_fraction=0.43, bf16="fp32", sources=_PI),
    _other("raspberry-pi-5-8gb", 0.154, 0.154, 17.1, 8.25, 0.8, 0.3, 0.29, (3.0, 12.7), launch_us=5,
           bandwidth_fraction=0.43, bf16="fp32", sources=_PI),
    _other("raspberry-pi-5-16gb", 0.154, 0.154, 17.1, 16.49, 0.8, 0.3, 0.29, (3.0, 13.8), launch_us=5,
           bandwidth_fraction=0.43, bf16="fp32", sources=_PI),
    _other("phone-snapdragon-778g", 0.21, 0.21, 25.6, 7.5, 4.0, 0.2, 0.015, (1.0, 4.0), launch_us=5,
            bf16="fp32", sources=_PHONE_CPU),
    _other("phone-snapdragon-8-gen2", 2.1, 4.2, 67.2, 8.0, 4.0, 0.2, 0.01, (1.0, 6.5), launch_us=30,
            bf16="fp16", sources=_PHONE_GPU),
    _other("phone-snapdragon-8-gen3", 2.8, 5.6, 76.8, 12.0, 4.0, 0.2, 0.01, (1.0, 6.5), launch_us=30,
            bf16="fp16", sources=_PHONE_GPU),
    _other("phone-apple-a17-pro", 2.15, 4.3, 51.2, 8.0, 4.0, 0.2, 0.01, (1.0, 7.0), launch_us=30,
            bf16="fp16", sources=_PHONE_GPU),
    _other("server-a100", 19.5, 312, 2039, 85.0, 0, 0.9, 0.76, (60, 400), launch_us=10,
           sources=_server(_QWEN, _LLM_ANALYSIS)),
    _other("server-a100-40gb", 19.5, 312, 1555, 42.5, 0, 0.9, 0.76, (60, 400), launch_us=10,
           sources=_server(f"{_QWEN} of 80 GB, assumed equal", _LLM_ANALYSIS, _AS_A100)),
    _other("server-h100", 67, 989, 3350, 85.0, 0, 0.9, 0.40, (105, 700), launch_us=10,
           sources=_server(_FOUNDRY, _LLM_ANALYSIS, _AS_A100)),
    _other("server-h200", 67, 989, 4800, 149, 0, 0.9, 0.40, (105, 700), launch_us=10,
           sources=_server(f"{_FOUNDRY}, assumed equal", ML_ENGINEERING)),
    _other("server-rtx-4090", 82.6, 165.2, 1008, 25.4, 0, 0.9, 0.87, (65, 450), launch_us=10,
           sources=_server(_RTX_4090, f"{HF_HARDWARE}; FP16 and bandwidth recalled")),
    _other("server-l40s", 91.6, 362, 864, 48, 0, 0.9, 0.78, (50, 350), launch_us=10,
           sources=_server("0.78: fitted to three LoRA steps of Llama-3.2-3B, HF and PEFT (huggingface/peft)", "recalled",
                           "nominal GPU memory")),
)  # fmt: skip
