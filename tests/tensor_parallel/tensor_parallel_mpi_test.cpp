// The laws of communicator_test and tensor_parallel_test, with ranks that are MPI processes:
//   mpirun -n 3 ./tensor_parallel_mpi_test
// Rank 0 prints the report, other ranks only their failures; every rank exits with 1 where any rank
// failed.
#include "../communicator/communicator_cases.h"
#include "tensor_parallel_cases.h"

using namespace eigenformer_test;

namespace {

static_assert(ef::Communicator<ef::MpiCommunicator>);

TEST(MpiCommunicator, CollectivesEqualTheirDefinition) {
  ef::MpiCommunicator communicator(MPI_COMM_WORLD);
  check_collectives(communicator);
  check_bad_arguments(communicator);
  check_mismatches(communicator);
}

TEST(MpiCommunicator, LongMessagesTravelInPieces) {
  for (Index largest : {1, 5, 64}) {
    ef::MpiCommunicator communicator(MPI_COMM_WORLD, {.largest_message = largest});
    check_all_gather<double>(communicator);
    check_broadcast<float>(communicator);
    check_all_reduce<ef::bfloat16>(communicator);
  }
  ef::MpiCommunicator trusting(MPI_COMM_WORLD, {.compare_calls = false});
  check_collectives(trusting);
}

TEST(MpiCommunicator, OwnsWhatItIsTold) {
  MPI_Comm reversed = MPI_COMM_NULL;
  int rank = 0, size = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  ASSERT_EQ(MPI_Comm_split(MPI_COMM_WORLD, 0, -rank, &reversed), MPI_SUCCESS);
  {
    ef::MpiCommunicator borrowed(reversed);
    EXPECT_EQ(borrowed.rank(), size - 1 - rank);
    ef::MpiCommunicator moved(std::move(borrowed));
    check_all_gather<float>(moved);
  }
  // frees it: MPI_Finalize reports leaks under a debugging MPI
  ef::MpiCommunicator owner(reversed, {.take_ownership = true});
  EXPECT_EQ(owner.size(), size);
  owner.barrier();
  expect_throws<std::invalid_argument>(
      [] { ef::MpiCommunicator(MPI_COMM_WORLD, {.largest_message = 0}); },
      {"largest_message is 0"});
}

TEST(MpiCommunicator, FailuresOfMpiAreExceptions) {
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  expect_throws<ef::CommunicatorError>([] { ef::MpiCommunicator communicator(MPI_COMM_NULL); },
                                       {"MPI_Comm_dup"});
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_ARE_FATAL);
}

TEST(MpiTensorParallel, EqualsLinear) {
  ef::MpiCommunicator communicator;
  check_tensor_parallel(communicator);
}

/// What ranks other than 0 print: nothing but failures.
class FailuresOnly : public ::testing::EmptyTestEventListener {
 public:
  explicit FailuresOnly(int rank) : rank_(rank) {}
  void OnTestPartResult(const ::testing::TestPartResult& result) override {
    if (result.failed())
      std::fprintf(stderr, "rank %d: %s:%d %s\n", rank_, result.file_name(), result.line_number(),
                   result.summary());
  }

 private:
  int rank_;
};

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  ::testing::InitGoogleTest(&argc, argv);
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
  if (rank != 0) {
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new FailuresOnly(rank));  // GoogleTest owns it
  }
  const int failed = RUN_ALL_TESTS();
  int any_failed = 0;
  MPI_Allreduce(&failed, &any_failed, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  MPI_Finalize();
  return any_failed;
}
