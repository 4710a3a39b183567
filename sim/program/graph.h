// The step program as a Boost graph: operations are vertices, dependencies within the step and the order of
// each stream are edges. For inspection and independent checks; the simulator and the executors walk the
// program itself.
#pragma once
#include <boost/graph/adjacency_list.hpp>
#include <ostream>

#include "sim/program/program.h"

namespace mop::program {

using Graph = boost::adjacency_list<boost::vecS, boost::vecS, boost::bidirectionalS>;

Graph to_graph(const StepProgram& program);

// Graphviz text: a colour a stream, operations by name.
void write_dot(std::ostream& out, const StepProgram& program);

}  // namespace mop::program
