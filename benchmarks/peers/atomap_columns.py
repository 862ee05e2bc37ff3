"""atomap's own way to the columns of a perovskite: IMAGE.npy in, POSITIONS.npz out. Runs in atomap's environment.

The bright sublattice by peaks of the blurred image, centre of mass and Gaussian refinement; the weaker one from its
zone axes, on the image with the bright columns subtracted.
"""

import resource
import sys
import time
import warnings

import atomap.api as am
import hyperspy.api as hs
import numpy as np
from atomap.tools import remove_atoms_from_image_using_2d_gaussian
from scipy.ndimage import gaussian_filter

warnings.simplefilter("ignore")
image = np.load(sys.argv[1])
cell_px = float(sys.argv[3])
begun = time.process_time()
blurred = hs.signals.Signal2D(gaussian_filter(image, 2.0))
first = am.get_atom_positions(blurred, separation=round(0.6 * cell_px))
bright = am.Sublattice(first, image=image)
bright.find_nearest_neighbors()
bright.refine_atom_positions_using_center_of_mass(show_progressbar=False)
bright.refine_atom_positions_using_2d_gaussian(show_progressbar=False)
bright.construct_zone_axes()
lengths = [np.hypot(*vector) for vector in bright.zones_axis_average_distances]
diagonal = bright.zones_axis_average_distances[int(np.argmin(np.abs(np.array(lengths) - np.sqrt(2) * cell_px)))]
between = bright.find_missing_atoms_from_zone_vector(diagonal)
without = remove_atoms_from_image_using_2d_gaussian(image, bright, show_progressbar=False)
weak = am.Sublattice(between, image=without)
weak.find_nearest_neighbors()
weak.refine_atom_positions_using_center_of_mass(show_progressbar=False)
weak.refine_atom_positions_using_2d_gaussian(show_progressbar=False)
spent = time.process_time() - begun
position = np.concatenate([np.column_stack([s.y_position, s.x_position]) for s in (bright, weak)])
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
np.savez(sys.argv[2], position=position, cpu_s=spent, memory_MB=memory)
