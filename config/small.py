# The default ZayaConfig: 11M parameters, 1.9M active. An hour on a laptop, minutes on a GPU.
out_dir = 'runs/small'
max_steps = 2000
batch_size = 16         # 16 * 256 = 4,096 tokens per step; 8.2M tokens in total, 3.4 epochs of the standard library
