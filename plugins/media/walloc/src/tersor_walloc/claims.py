"""What the paper says of WaLLoC, at small scale, with the shipped states (none of these images was trained on)."""

import time
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np
import torch

import tersor
from tersor import metrics
from tersor.evidence import Row, claim, data
from tersor_walloc.walloc import WaLLoC
from tersor_walloc.wavelet import analysis

JPEG_QUALITIES = (1, 3, 6, 10, 15, 22, 32, 45, 60, 75, 85)  # in order of size


def psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    """dB over RGB, both rounded to 8 bits as an image file would hold them."""
    return float(-10 * torch.log10((torch.round(x * 255) - torch.round(y * 255)).square().mean() / 255**2))


def ms_ssim(x: torch.Tensor, y: torch.Tensor) -> float:
    """Multi-scale structural similarity as -10 log10(1 - value) dB."""
    return float(-10 * np.log10(1 - metrics.ms_ssim(x, y)))


def kodak() -> dict[str, np.ndarray]:
    """The Kodak photographs at hand, if any: float32 3 x H x W."""
    from tersor.io import load_image

    found = {f"kodim{i:02d}": data.shared(f"kodak/kodim{i:02d}.png") for i in range(1, 25)}
    return {name: load_image(path) for name, path in found.items() if path is not None}


def curve(codecs: list[tersor.Codec], x: torch.Tensor) -> np.ndarray:
    """bits per pixel of the whole file, PSNR and MS-SSIM (dB): 3 x codecs."""
    points = []
    for codec in codecs:
        payload = codec.encode(x)
        back = torch.as_tensor(np.asarray(codec.decode(payload)))
        points.append((8 * payload.nbytes / x[0].numel(), psnr(x, back), ms_ssim(x, back)))
    return np.array(points).T


@claim("less distortion than jpeg at equal bits per pixel, at low rates")
def below_jpeg(seed: int) -> Iterator[Row]:
    jpeg = [tersor.codec("jpeg", quality=q) for q in JPEG_QUALITIES]
    settings = [(None, q) for q in (1, 2, 3, 5, 8)] + [(48, q) for q in (1, 4, 8)]
    ours = [WaLLoC(latent_channels=latents, quality=q) for latents, q in settings]
    for label, images in (("photographs", data.photographs()), ("Kodak images", kodak())):
        every = []
        for name, array in images.items():
            x = torch.from_numpy(array)
            bits, *got = curve(ours, x)
            jpeg_bits, *theirs = curve(jpeg, x)
            base = [np.interp(np.log(bits), np.log(jpeg_bits), side) for side in theirs]
            every.append((bits, *got, *base, bits < jpeg_bits.min()))
            if label == "photographs":
                reach = f"; jpeg's smallest file has {jpeg_bits.min():.3f}" if bits[3] < jpeg_bits.min() else ""
                note = f"{ours[3]}, {bits[3]:.3f} bits per pixel; jpeg interpolated over log rate{reach}"
                for metric, a, b in (("PSNR (dB)", got[0], base[0]), ("MS-SSIM (dB)", got[1], base[1])):
                    yield Row(claim=f"{name}: less distortion than jpeg at equal bits", metric=metric, ours=a[3], baseline=b[3],
                              baseline_name="jpeg", better="higher", note=note)  # fmt: skip
        if not every:
            continue
        mean = np.mean(every, 0)
        short = np.sum([one[-1] for one in every], 0)
        for i, codec in enumerate(ours):
            note = f"{mean[0][i]:.3f} bits per pixel on average; jpeg interpolated over log rate, image by image"
            if short[i]:
                note += f"; {short[i]} of these files are smaller than any of jpeg's, which are then compared at quality 1"
            for metric, a, b in (("mean PSNR (dB)", mean[1], mean[3]), ("mean MS-SSIM (dB)", mean[2], mean[4])):
                title = f"{len(every)} {label}, {codec}: less distortion than jpeg at equal bits"
                yield Row(claim=title, metric=metric, ours=a[i], baseline=b[i], baseline_name="jpeg", better="higher", note=note)


@claim("the dimensionality reduction is the same for every image")
def uniform(seed: int) -> Iterator[Row]:
    from scipy.fft import dctn

    table = np.array(
        [16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80,
         62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98,
         112, 100, 103, 99]
    ).reshape(8, 8)  # fmt: skip
    ratios, kept = [], []
    for x in (data.photographs() | kodak()).values():
        height, width = (n // 8 * 8 for n in x.shape[1:])
        x = x[:, :height, :width]
        ratios.append(x.size / WaLLoC().latent(torch.from_numpy(x)).size)
        grey = x.mean(0).reshape(height // 8, 8, width // 8, 8).transpose(0, 2, 1, 3) * 255 - 128
        kept.append(np.count_nonzero(np.rint(dctn(grey, axes=(2, 3), norm="ortho") / (table * 5))) / grey.size)
    yield Row(claim="the latent has a fixed fraction of the samples", metric="largest over smallest fraction, over images",
              ours=max(ratios) / min(ratios), baseline=max(kept) / min(kept), better="lower",
              baseline_name="non-zero DCT coefficients at JPEG quality 10",
              note=f"{len(ratios)} images of whole 8 x 8 blocks; {min(ratios):g} samples for each latent value in all of them")  # fmt: skip
    yield Row(claim="fewer values than samples", metric="RGB samples for each value of the representation", ours=min(ratios), baseline=2.0,
              baseline_name="jpeg with 4:2:0 subsampling (every coefficient has a place)", better="higher")  # fmt: skip


@claim("the encoder is linear but for one curve, and costs a small part of the decoder")
def linear_encoder(seed: int) -> Iterator[Row]:
    codec = WaLLoC()
    network, coder = codec._models["image"]
    samples = 3 * 512 * 512
    bands, latents = network.project.weight.shape[1], network.project.weight.shape[0]
    # one lifting level of one axis: 4 steps of 3 operations and a scale of 1 each for a pair of samples
    transform = samples * network.levels * network.axes * (4 * 3 + 2) / 2
    projection = 2 * samples / bands * bands * latents
    curve_operations = samples / bands * latents * 2  # the companding curve and rounding
    positions = samples / bands
    weights = {name: p.numel() for name, p in network.named_parameters() if name.endswith("weight")}
    decoder = transform + 2 * positions * sum(n for name, n in weights.items() if not name.startswith("project"))
    linear = transform + projection + positions * latents
    yield Row(claim="the encoder is almost entirely linear", metric="linear share of the encoder's operations",
              ours=linear / (linear + curve_operations), baseline=0.95, baseline_name="95 %", better="higher",
              note=f"512 x 512 RGB: {linear / 1e6:.1f} M linear, {curve_operations / 1e6:.2f} M in the curve and rounding")  # fmt: skip
    yield Row(claim="the encoder is a small part of the decoder", metric="operations for 512 x 512 RGB (millions)",
              ours=(linear + curve_operations) / 1e6, baseline=decoder / 1e6, baseline_name="the decoder of the same state", better="lower")  # fmt: skip
    parameters = sum(p.numel() for p in network.project.parameters()) + network.log_step.numel()
    yield Row(claim="the encoder is a small part of the decoder", metric="parameters", ours=parameters, better="lower",
              baseline=sum(p.numel() for p in network.parameters()) - parameters, baseline_name="the decoder of the same state")  # fmt: skip
    x = torch.from_numpy(data.photographs()["astronaut"])
    quality = torch.tensor([codec.quality])
    integers = codec.latent(x)
    y = torch.from_numpy(integers).float()[None]
    payload = codec.encode(x)

    def seconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            with torch.inference_mode():
                run()
            times.append(time.perf_counter() - start)
        return median(times)

    note = f"one thread, median of 7; the wavelet packets alone take {seconds(lambda: analysis(x[None], 3)):.4f} s"
    yield Row(claim="encoding is faster than decoding", metric="seconds, transform and network, 512 x 512 RGB",
              ours=seconds(lambda: network.encode(x[None], quality)), baseline=seconds(lambda: network.decode(y, quality)),
              baseline_name="the decoder of the same state", better="lower", note=note)  # fmt: skip
    yield Row(claim="encoding is faster than decoding", metric="seconds, whole file with entropy coding, 512 x 512 RGB",
              ours=seconds(lambda: codec.encode(x)), baseline=seconds(lambda: codec.decode(payload)),
              baseline_name="the decoder of the same state", better="lower",
              note=f"of which entropy coding {seconds(lambda: coder.encode(integers)):.4f} s")  # fmt: skip
