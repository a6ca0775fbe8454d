//! Objects by number.

use std::collections::VecDeque;

/// Numbers of 24 bits, never 0 to 0xff, the low 16 a place and the others how
/// often it was taken: a number that was given up comes back late.
pub struct Slab<T> {
    places: Vec<(u8, Option<T>)>,
    free: VecDeque<u16>,
    len: usize,
}

/// Places that are not used, so that no number looks like a special one (queue
/// pairs 0 and 1, a key of 0).
const RESERVED: usize = 0x100;

fn split(number: u32) -> (usize, u8) {
    ((number & 0xffff) as usize, (number >> 16) as u8)
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { places: (0..RESERVED).map(|_| (0, None)).collect(), free: VecDeque::new(), len: 0 }
    }
}

impl<T> Slab<T> {
    /// Takes a place; `None` if there is none. `make` is told the number.
    pub fn insert(&mut self, make: impl FnOnce(u32) -> T) -> Option<u32> {
        let place = match self.free.pop_front() {
            Some(place) => usize::from(place),
            None if self.places.len() <= usize::from(u16::MAX) => {
                self.places.push((0, None));
                self.places.len() - 1
            }
            None => return None,
        };
        let (generation, object) = &mut self.places[place];
        let number = u32::from(*generation) << 16 | place as u32;
        *object = Some(make(number));
        self.len += 1;
        Some(number)
    }

    pub fn get(&self, number: u32) -> Option<&T> {
        let (place, generation) = split(number);
        self.places.get(place).filter(|(g, _)| *g == generation)?.1.as_ref()
    }

    pub fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        let (place, generation) = split(number);
        self.places.get_mut(place).filter(|(g, _)| *g == generation)?.1.as_mut()
    }

    pub fn remove(&mut self, number: u32) -> Option<T> {
        let (place, generation) = split(number);
        let (g, object) = self.places.get_mut(place).filter(|(g, _)| *g == generation)?;
        let object = object.take()?;
        *g = g.wrapping_add(1);
        self.free.push_back(place as u16);
        self.len -= 1;
        Some(object)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// All objects with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let number = |place: usize, generation: u8| u32::from(generation) << 16 | place as u32;
        self.places.iter().enumerate().filter_map(move |(i, (g, o))| o.as_ref().map(|o| (number(i, *g), o)))
    }
}
