"""`python -m runtime.convert FOLDER OUT`: write a run or a released folder in the layout of ZAYA1-8B."""
import os
import shutil
import sys

import configurator
from runtime.pretrained import copy_folder, load, save_pretrained

if __name__ == '__main__':
    with configurator.one_line_errors('runtime.convert'):
        folders, = configurator.read_with_files(sys.argv[1:])
        if len(folders) != 2:
            raise ValueError('name a folder and the folder to write: python -m runtime.convert FOLDER OUT')
        folder, out = folders
        if os.path.exists(out):
            raise ValueError(f'{out} is already there: name another folder, or remove it')
        if os.path.exists(os.path.join(folder, 'config.json')):
            copy_folder(folder, out, lambda *tensor: [tensor], {}, share=1)
        else:
            unfinished = f'{os.path.normpath(out)}.unfinished'
            shutil.rmtree(unfinished, ignore_errors=True)
            save_pretrained(load(folder)[0], unfinished, run=folder)
            os.rename(unfinished, out)
