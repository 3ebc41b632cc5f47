# Reinforcement learning (rl.py), starting from runs/loops. First `python train.py config/loops.py`.
out_dir = 'runs/rl'
init_from = 'runs/loops'
