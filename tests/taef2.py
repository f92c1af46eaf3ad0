"The patch that diffusers needs for the VAE `taef2`: six of its blocks have a pooled branch that `AutoencoderTiny` lacks"
import diffusers
from torch import nn
from safetensors.torch import load_file
from t2i_nb.vae import fold_statistics, measure_latents

class PooledBlock(nn.Module):
    "A block of `AutoencoderTiny` with a pooled branch before it"
    def __init__(self, block, channels=64, hidden=256):
        super().__init__()
        self.conv, self.skip, self.fuse = block.conv, block.skip, block.fuse
        self.pool = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.GroupNorm(4, hidden), nn.ReLU(),
                                  nn.Conv2d(hidden, channels, 1, bias=False))
    def forward(self, x):
        x = x + self.pool(x)
        return self.fuse(self.conv(x) + self.skip(x))

class Taef2(diffusers.AutoencoderTiny):
    "`AutoencoderTiny` with the pooled branches"
    def __init__(self, latent_channels=32, scaling_factor=1., **kwargs):
        super().__init__(latent_channels=latent_channels, scaling_factor=scaling_factor)
        for layers, places in ((self.encoder.layers, (11, 12, 13)), (self.decoder.layers, (2, 3, 4))):
            for i in places: layers[i] = PooledBlock(layers[i])

def save_taef2(
    weights, # folder with the fp16 weights
    out,     # gets a diffusers folder of class `Taef2`
    batches  # images (b, 3, h, w) in [-1, 1] whose latents get unit variance
):
    "Write the VAE in diffusers' layout, its scale folded, and let diffusers know its class"
    diffusers.Taef2 = Taef2
    vae = Taef2()
    vae.load_state_dict({k: v.float() for k, v in load_file(weights/'diffusion_pytorch_model.fp16.safetensors').items()})
    fold_statistics(vae.eval(), *measure_latents(vae, batches)).save_pretrained(out)
