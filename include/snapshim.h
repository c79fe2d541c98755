/* For programs that want to say themselves what belongs together.
 *
 *     #include "snapshim.h"
 *
 *     snapshim_begin();
 *     ... several writes, to any number of files ...
 *     snapshim_end();
 *
 * `snapshim checkpoint --at unit` then makes its cut while no thread is between the
 * two. Units nest, and each belongs to the thread that begins it; one that is never ended keeps
 * the point from being reached, and does no other harm. snapshim_begin() may wait for the
 * end of a hold, at most as long as the set's hold bound.
 *
 * There is nothing to link with: without libsnapshim.so both do nothing. GCC or Clang; a
 * program that is linked at a fixed address (-no-pie) needs -fPIC here, or
 * -Wl,-z,dynamic-undefined-weak.
 */
#ifndef SNAPSHIM_H
#define SNAPSHIM_H

#ifdef __cplusplus
extern "C" {
#endif

__attribute__((weak)) void snapshim_begin(void);
__attribute__((weak)) void snapshim_end(void);

#ifdef __cplusplus
}
#endif

#define snapshim_begin() ((snapshim_begin) ? (snapshim_begin)() : (void)0)
#define snapshim_end() ((snapshim_end) ? (snapshim_end)() : (void)0)

#endif
