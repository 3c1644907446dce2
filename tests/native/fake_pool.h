// The threads of these tests: see fake_pool.cpp.
#pragma once

namespace fake_pool {

void at_most(unsigned threads);  // of the regions that follow
long regions();                  // so far

}  // namespace fake_pool
