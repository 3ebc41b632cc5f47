"""Count the parameters and the KV cache of the presets: `python -m evidence.sizes`.

Claims. ZAYA1-8B has 8.4B parameters, 0.76B of them active (report, arXiv 2605.05365, Table I), and its KV cache is 8
times smaller than that of full multi-head attention (II-A). model.sizes counts without allocating memory.
"""
import sys

import configurator
from bench import MEDIUM
from model import ZayaConfig, sizes


def main():
    heads = f'{"preset":<10}{"parameters":>16}{"active":>16}{"KV bytes per token":>20}'
    print(heads + f'{"full MHA":>10}{"smaller":>9}')
    for name, preset in ('zaya1_8b', ZayaConfig.zaya1_8b()), ('medium', MEDIUM), ('small', ZayaConfig()):
        n = sizes(preset)
        print(f'{name:<10}{n["total"]:>16,}{n["active"]:>16,}{n["kv_bytes"]:>20,}{n["mha_kv_bytes"]:>10,}'
              f'{n["mha_kv_bytes"] / n["kv_bytes"]:>8.0f}x')
    print('active: parameters used per token, without the embedding. KV cache: bf16, all layers.')


if __name__ == '__main__':
    with configurator.one_line_errors('evidence.sizes'):
        configurator.read(sys.argv[1:])                         # it has no settings
        main()
