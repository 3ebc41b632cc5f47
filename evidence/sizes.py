"""What the presets come to in parameters and in KV cache: `python -m evidence.sizes`.

Claims. ZAYA1-8B has 8.4B parameters, of which 0.76B work on each token (report, arXiv 2605.05365, Table I); its KV
cache is 8 times smaller than full multi-head attention's (II-A). Counted by model.sizes, without allocating anything.
"""
from bench import MEDIUM
from model import ZayaConfig, sizes

if __name__ == '__main__':
    heads = f'{"preset":<10}{"parameters":>16}{"active a token":>16}{"KV bytes a token":>18}'
    print(heads + f'{"full MHA":>10}{"smaller":>9}')
    for name, preset in ('zaya1_8b', ZayaConfig.zaya1_8b()), ('medium', MEDIUM), ('small', ZayaConfig()):
        n = sizes(preset)
        print(f'{name:<10}{n["total"]:>16,}{n["active"]:>16,}{n["kv_bytes"]:>18,}{n["mha_kv_bytes"]:>10,}'
              f'{n["mha_kv_bytes"] / n["kv_bytes"]:>8.0f}x')
    print('active: parameters that work on one token, without the embedding. KV cache in bf16, over all layers.')
