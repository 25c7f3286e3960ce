"""The Jetson modules.

FP32 peak = cores x 2 x clock; tensor FP16 = tensor cores x FMA per clock x 2 x clock, dense.
"""

from __future__ import annotations

from fleetune.fleet.profile import DeviceProfile, PowerMode

GIB = 2**30
HF_HARDWARE = "huggingface.js packages/tasks/src/hardware-nvidia.ts @ fe42e68"
EDGE_FLOWER = "EdgeFlowerTune, current_system_and_device_profile_20260421.md"
NVPMODEL = "NVIDIA nvpmodel files (LineageOS android_device_nvidia_concord)"
ML_ENGINEERING = "stas00/ml-engineering"
BUS = "bus width x data rate"
SEEN = "MemTotal assumed 0.96 of nominal, as seen on AGX Xavier 16GB (15,700 MiB), AGX Orin 64GB (61.4 GiB)"
DESKTOP = "idle 1.8 GB with a desktop (recalled)"
HEADLESS = "idle 0.8 GB headless (assumed as measured on Jetson Nano)"
TX2_SUSTAINED = "fp32 0.53: fitted to BERT-base on a TX2, PyTorch, 1.70 s a step of 4 x 256 (AutoFedNLP exps_data)"
TENSOR_SUSTAINED = (
    "assumed: fp32 as fitted to a TX2; 16 bit 0.05, no more FLOP/s than in fp32. PyTorch's LoRA of LLaMA2-7B takes 7.3 s a "
    "step of 512 tokens and 30.9 GB on an AGX Orin (PockEngine, arXiv 2310.17752): read as 16 bit that is 0.05, but its "
    "memory is that of fp32, in which it is 0.37. Nothing measured tells what PyTorch reaches on these tensor cores; engines "
    "with kernels of their own are several times as fast"
)
TX2_POWER = "12 W while computing measured on TX2 (FedAdapter, draw-cost-energy.py); idle assumed"
CAP_POWER = "active: assumed to be the cap of the highest capped mode; idle assumed"
MODE_POWER = "active watts of lower modes assumed to fall with cores and clock squared, below the mode's cap"


def _jetson(
    name: str,
    fp32_tflops: float,
    fp16_tflops: float,
    gigabytes_per_second: float,
    memory_gib: float,
    os_idle_gb: float,
    watts: tuple[float, float],
    *,
    compute: str,
    memory: str,
    sustained: tuple[float, float] = (0.53, 0.05),
    sustained_source: str = TENSOR_SUSTAINED,
    bandwidth: tuple[float, str] = (0.8, "0.8 of it assumed, as measured on AGX Orin"),
    launch_us: float = 30,
    modes: dict[str, PowerMode] | None = None,
    power: str = CAP_POWER,
    mode_source: str = NVPMODEL,
) -> DeviceProfile:
    return DeviceProfile(
        name=f"jetson-{name}", fp32_flops=fp32_tflops * 1e12, fp16_flops=fp16_tflops * 1e12,
        sustained_fp32=sustained[0], sustained_fp16=sustained[1],
        bandwidth_bytes_per_second=gigabytes_per_second * 1e9, sustained_bandwidth_fraction=bandwidth[0],
        memory_bytes=memory_gib * GIB, os_idle_bytes=os_idle_gb * 1e9, context_bytes=0.5e9,
        idle_watts=watts[0], active_watts=watts[1], launch_seconds=launch_us * 1e-6,
        bf16="native" if "orin" in name or "thor" in name else "fp16",
        modes=tuple((modes or {}).items()),
        sources=(
            ("compute", compute), ("sustained", sustained_source), ("bandwidth", f"{BUS}; {bandwidth[1]}"),
            ("memory", f"{memory}; CUDA and PyTorch 0.5 GB assumed (0.5 to 2 GiB measured on servers, "
                       f"{ML_ENGINEERING})"),
            ("power", power + (f"; modes: {mode_source}; {MODE_POWER}" if modes else "")),
            ("launch", "assumed from the class of CPU core"),
            ("bf16", "from compute capability 8.0, Ampere, on (NVIDIA CUDA C++ Programming Guide, arithmetic instructions)"),
        ),
    )  # fmt: skip


def _modes(full: tuple[int, float], **modes: tuple[float, int, float, float]) -> dict[str, PowerMode]:
    """Modes as (watts, powered TPCs, GPU MHz, memory clock fraction) against TPCs and MHz at the maximum."""
    return {
        name.strip("_").replace("_", "-"): PowerMode(watts, tpcs * mhz / (full[0] * full[1]), emc, mhz / full[1])
        for name, (watts, tpcs, mhz, emc) in modes.items()
    }


EMC_LOW = 2133 / 3199  # the memory clock of the lowest modes against its maximum
_ORIN_BANDWIDTH = (
    0.80,
    "0.80 reached: Qwen2.5-3B / Qwen3-4B decoding on AGX Orin (TensorRT-Edge-LLM issue 60)",
)
_NANO_BANDWIDTH = (
    0.88,
    "0.88 reached: INT4 Llama-3.1-8B decoding on Orin Nano (NVIDIA blog; weight size assumed)",
)
_NANO_SEEN = "7,619 MiB seen, of which 620 are used when idle and headless (tegrastats); 0.6 to 0.8 GB, 0.8 taken"
_ORIN_SEEN = "MemTotal assumed 0.93 of nominal, as seen on Orin Nano 8GB"
_NX_CLOCKS = (
    "GPU 1100 MHz, 384 cores, 48 tensor cores (NVIDIA DA-09366-001, preliminary); 59.7 GB/s (NVIDIA's current page)"
)
_AGX_CLOCKS = f"{HF_HARDWARE}; 512 cores (deviceQuery of an AGX Xavier)"
_ORIN = f"{HF_HARDWARE}; {NVPMODEL}"
_TX2_CLOCKS = f"{HF_HARDWARE}; GPU 1.30 GHz in MaxN"

# name, FP32 TFLOPS, FP16 TFLOPS (dense), GB/s, MemTotal in GiB, idle GB, (idle W, active W)
JETSONS = (
    _jetson("nano", 0.236, 0.472, 25.6, 3964 / 1024, 0.85, (1.5, 10), compute=f"{HF_HARDWARE}; {EDGE_FLOWER}",
            memory=f"3964 MiB seen, 750 to 863 MiB used when idle ({EDGE_FLOWER})", sustained=(0.20, 0.10),
            sustained_source="fp32 0.20: fitted to Gemma-3-270M LoRA, 12.4 s a step, mean of three boards (EdgeFlowerTune), "
                             "which swapped: the run needs more memory than the board has; 16 bit assumed no faster",
            launch_us=100, modes=_modes((1, 921), _5w=(5, 1, 640, 1.0)), mode_source="recalled"),
    _jetson("tx2", 0.667, 1.33, 59.7, 0.96 * 8, 1.8, (2, 12), compute=_TX2_CLOCKS, memory=f"{SEEN}; "
                                                                                          f"{DESKTOP}",
            sustained=(0.53, 0.27), sustained_source=f"{TX2_SUSTAINED}; 16 bit assumed no faster", launch_us=75,
            modes=_modes((1, 1300), maxp=(15, 1, 1120, 0.857), maxq=(7.5, 1, 850, 0.713)), power=TX2_POWER,
            mode_source="nvpmodel"),
    _jetson("tx2-nx", 0.667, 1.33, 51.2, 3964 / 1024, 0.8, (2, 12), compute=_TX2_CLOCKS + "; TX2 NX assumed "
                                                                                          "equal",
            memory=f"MemTotal assumed as Jetson Nano 4GB; {HEADLESS}", sustained=(0.53, 0.27),
            sustained_source=f"{TX2_SUSTAINED}, assumed here; 16 bit assumed no faster", launch_us=75,
            modes=_modes((1, 1300), maxq=(7.5, 1, 850, 0.713 * 59.7 / 51.2)), power=TX2_POWER,
            mode_source="assumed as the TX2's, with its memory clock"),
    _jetson("xavier-nx-8gb", 0.845, 6.76, 59.7, 0.96 * 8, 1.8, (4, 20), compute=_NX_CLOCKS,
            memory=f"{SEEN}; {DESKTOP}",
            launch_us=50),
    _jetson("xavier-nx-16gb", 0.845, 6.76, 59.7, 0.96 * 16, 1.8, (4, 20), compute=_NX_CLOCKS,
            memory=f"{SEEN}; {DESKTOP}", launch_us=50),
    _jetson("agx-xavier-16gb", 1.41, 11.3, 136.5, 15700 / 1024, 1.8, (6, 30), compute=_AGX_CLOCKS,
            memory=f"15,700 MiB seen (deviceQuery of an AGX Xavier); {DESKTOP}", launch_us=50),
    _jetson("agx-xavier-32gb", 1.41, 11.3, 136.5, 0.96 * 32, 1.8, (6, 30), compute=_AGX_CLOCKS,
            memory=f"{SEEN}; {DESKTOP}", launch_us=50),
    _jetson("agx-xavier-64gb", 1.41, 11.3, 136.5, 0.96 * 64, 1.8, (6, 30), compute=_AGX_CLOCKS,
            memory=f"{SEEN}; {DESKTOP}", launch_us=50),
    _jetson("orin-nano-4gb", 0.64, 5.1, 34.1, 0.93 * 4, 0.8, (3, 10), compute=f"{_ORIN}; 625 MHz, data sheet",
            memory=f"{_ORIN_SEEN}; {HEADLESS}", bandwidth=_NANO_BANDWIDTH,
            modes=_modes((2, 625), _7w=(7, 2, 408, 1.0), _7w_cpu=(7, 2, 306, 1.0))),
    _jetson("orin-nano-8gb", 1.28, 10.2, 68.3, 7619 / 1024, 0.8, (3, 15), compute=f"{_ORIN}; 625 MHz, data sheet",
            memory=_NANO_SEEN,
            bandwidth=_NANO_BANDWIDTH, modes=_modes((4, 625), _7w=(7, 2, 408, 1.0))),
    _jetson("orin-nano-8gb-super", 2.09, 16.7, 102.4, 7619 / 1024, 0.8, (3, 25),
            compute="1.02 GHz, 67 sparse INT8 TOPS, 102 GB/s (brojogopalsapui.com)", memory=_NANO_SEEN,
            bandwidth=_NANO_BANDWIDTH),
    _jetson("orin-nx-8gb", 1.57, 12.5, 102.4, 0.93 * 8, 1.8, (4, 20), compute=_ORIN, memory=f"{_ORIN_SEEN}; "
                                                                                            f"{DESKTOP}",
            bandwidth=_ORIN_BANDWIDTH,
            modes=_modes((4, 765), _20w=(20, 4, 408, 1.0), _15w=(15, 2, 612, 1.0),
            _10w=(10, 2, 612, EMC_LOW))),
    _jetson("orin-nx-16gb", 1.88, 15.0, 102.4, 15656 / 1024, 1.8, (4, 25), compute=_ORIN,
            memory=f"15,656 MiB seen (tegrastats, JetPack 6); {DESKTOP}", bandwidth=_ORIN_BANDWIDTH,
            modes=_modes((4, 918), _25w=(25, 4, 408, 1.0), _15w=(15, 2, 612, 1.0),
            _10w=(10, 2, 612, EMC_LOW))),
    _jetson("agx-orin-32gb", 3.33, 26.7, 204.8, 0.96 * 32, 1.8, (8, 40), compute=_ORIN,
            memory=f"{SEEN}; {DESKTOP}",
            bandwidth=_ORIN_BANDWIDTH, launch_us=20,
            modes=_modes((7, 930), _40w=(40, 7, 816, 1.0), _30w=(30, 4, 612, 1.0),
            _15w=(15, 3, 408, EMC_LOW))),
    _jetson("agx-orin-64gb", 5.32, 42.6, 204.8, 64_349_016 / 2**20, 1.8, (8, 60), compute=_ORIN,
            memory=f"64,349,016 kB seen (a GitHub report); {DESKTOP}", bandwidth=_ORIN_BANDWIDTH,
            launch_us=20,
            modes=_modes((8, 1300), _50w=(50, 8, 816, 1.0), _30w=(30, 4, 612, 1.0),
            _15w=(15, 3, 408, EMC_LOW))),
    _jetson("agx-thor", 8.06, 258.5, 273, 0.96 * 128, 1.8, (15, 130), memory=f"{SEEN}; {DESKTOP}",
            launch_us=15,
            compute="258.5 TFLOPS (huggingface.co/hardware/jetson-t5000); fp32 from 20 SM at 1.575 GHz, "
                    "bandwidth: recalled"),
)  # fmt: skip
