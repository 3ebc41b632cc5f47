# The defaults (ZayaConfig), 11M parameters of which 1.9M are active: an hour on a laptop, minutes on a GPU.
out_dir = 'runs/small'
max_steps = 2000
batch_size = 16         # 16 * 256 = 4,096 tokens a step; 8.2M tokens in all, 3.4 epochs of the standard library
